"""Retention and validation."""

from typing import Annotated, Literal

from pydantic import Field

from tessera.contracts.base import Name
from tessera.contracts.errors import Problem
from tessera.contracts.events import RetentionPolicy, SweepItem, ValidationReport
from tessera.gateway.routes.schemas.common import Body, Truth, View, examples


class PolicyView(View):
    """The policy in force; none where the tenant has none."""

    policy: RetentionPolicy | None
    version: int
    updated_at: str | None


class SweepBody(Body):
    """`POST /v1/retention/sweeps`: a dry run names what it would archive; with `plan` exactly that is archived."""

    model_config = examples({"dry_run": True})

    dry_run: Truth = True
    plan: Annotated[Name | None, Field(description="Id of an earlier dry run to carry out.")] = None


class ResourceView(View):
    """Work that was accepted; `url` shows how far it is."""

    id: str
    status: Literal["accepted"] = "accepted"
    url: str


class SweepView(View):
    """A sweep and one page of what it names."""

    id: str
    dry_run: bool
    status: Literal["planned", "running", "completed", "failed"]
    policy_version: int
    planned: int
    archived: int
    skipped: int
    data: list[SweepItem]
    has_more: bool
    next_cursor: str | None
    created_at: str
    finished_at: str | None
    problem: Problem | None


class DatasetView(View):
    """An uploaded dataset."""

    id: str
    format: Literal["csv", "parquet", "jsonl"]
    size_bytes: int
    sha256: str


class ValidationBody(Body):
    """`POST /v1/validations`."""

    model_config = examples({"dataset": "0199…", "reference": None})

    dataset: Annotated[Name, Field(description="Id of the dataset to judge.")]
    reference: Annotated[Name | None, Field(description="Id of a dataset that is known to be good.")] = None


class ValidationView(View):
    """A validation and, once completed, its report."""

    id: str
    status: Literal["queued", "running", "completed", "failed"]
    created_at: str
    finished_at: str | None
    report: ValidationReport | None
    problem: Problem | None
