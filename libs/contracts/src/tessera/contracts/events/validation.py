"""Datasets and verdicts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tessera.contracts.base import EventData, Fraction, Moment, Name, Record, RequestData
from tessera.contracts.errors import Problem

Verdict = Literal["approve", "review", "reject"]


class DatasetReference(Record):
    """A dataset in the object store."""

    dataset_id: Name
    object_key: Annotated[str, Field(min_length=1, max_length=512)]
    format: Literal["csv", "parquet", "jsonl"]
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ValidationRequested(RequestData):
    """Judge a dataset, against a reference where there is one."""

    event_type: ClassVar[str] = "tessera.validation.requested.v1"

    validation_id: Name
    candidate: DatasetReference
    reference: DatasetReference | None = None


class ValidationInspected(RequestData):
    """Where does a validation stand?"""

    event_type: ClassVar[str] = "tessera.validation.inspected.v1"

    validation_id: Name


class ValidationCancelled(RequestData):
    """End a validation that nobody needs any more: one that is not over fails as `validation_cancelled`; answered as an inspection."""

    event_type: ClassVar[str] = "tessera.validation.cancelled.v1"

    validation_id: Name


class Evidence(Record):
    """What one dimension showed."""

    dimension: Name
    axis: Literal["collapse", "drift", "copying"]
    statistic: float
    interval: Annotated[tuple[float, float] | None, Field(description="95 % interval of the statistic.")] = None
    null_p_value: Annotated[Fraction | None, Field(description="Share of healthy resamples at least as extreme.")] = None
    passed: bool
    reason: Annotated[str, Field(max_length=1_000)]
    columns: Annotated[tuple[str, ...], Field(max_length=20, description="The columns that weigh most.")] = ()


class ValidationReport(Record):
    """The verdict with its evidence."""

    verdict: Verdict
    reasons: Annotated[tuple[str, ...], Field(min_length=1)]
    evidence: tuple[Evidence, ...]
    candidate_rows: Annotated[int, Field(ge=0)]
    reference_rows: Annotated[int | None, Field(ge=0)] = None
    columns: tuple[str, ...]


class ValidationReported(EventData):
    """A validation and, once completed, its report."""

    event_type: ClassVar[str] = "tessera.validation.reported.v1"

    validation_id: Name
    state: Literal["queued", "running", "completed", "failed"]
    created_at: Moment
    finished_at: Moment | None = None
    report: ValidationReport | None = None
    problem: Problem | None = None


class ValidationCompleted(EventData):
    """A verdict was reached; kept."""

    event_type: ClassVar[str] = "tessera.validation.completed.v1"

    validation_id: Name
    candidate: DatasetReference
    reference: DatasetReference | None = None
    report: ValidationReport
