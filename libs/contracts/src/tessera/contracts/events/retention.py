"""Policies and sweeps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tessera.contracts.base import EventData, Fraction, Moment, Name, Record, RequestData
from tessera.contracts.errors import Problem
from tessera.contracts.events.memory import MemoryKind


class RetentionPolicy(Record):
    """What may be archived: memories older than `max_age_days`, or at most as important as `importance_threshold`."""

    max_age_days: Annotated[int | None, Field(ge=1, le=36_500)] = None
    importance_threshold: Annotated[Fraction | None, Field(description="Archives what is at most this important.")] = None
    kinds: Annotated[tuple[MemoryKind, ...], Field(max_length=4, description="Only these kinds; all where empty.")] = ()

    @model_validator(mode="after")
    def _some_rule(self) -> RetentionPolicy:
        if self.max_age_days is None and self.importance_threshold is None:
            raise ValueError("a policy needs max_age_days, importance_threshold or both")
        return self


class PolicySubmitted(RequestData):
    """Set the tenant's policy."""

    event_type: ClassVar[str] = "tessera.policy.submitted.v1"

    policy: RetentionPolicy


class PolicyInspected(RequestData):
    """What is the tenant's policy?"""

    event_type: ClassVar[str] = "tessera.policy.inspected.v1"


class PolicyReported(EventData):
    """The policy in force; none where the tenant has none."""

    event_type: ClassVar[str] = "tessera.policy.reported.v1"

    policy: RetentionPolicy | None = None
    version: Annotated[int, Field(ge=0)]
    updated_at: Moment | None = None


class SweepRequested(RequestData):
    """Plan a sweep (`dry_run`), or run one: what is due now, or exactly what an earlier plan named."""

    event_type: ClassVar[str] = "tessera.sweep.requested.v1"

    sweep_id: Name
    dry_run: bool
    plan_id: Annotated[Name | None, Field(description="An earlier dry run to carry out exactly.")] = None


class SweepInspected(RequestData):
    """Where does a sweep stand, and what does it name?"""

    event_type: ClassVar[str] = "tessera.sweep.inspected.v1"

    sweep_id: Name
    limit: Annotated[int, Field(ge=1, le=500)] = 100
    after: Annotated[str | None, Field(max_length=256, description="Cursor of the page before.")] = None


class SweepCancelled(RequestData):
    """End a sweep: one that is not over fails as `sweep_cancelled`. What was asked of memory already is not taken back."""

    event_type: ClassVar[str] = "tessera.sweep.cancelled.v1"

    sweep_id: Name


class SweepItem(Record):
    """One memory that a sweep names, and the rule that named it."""

    memory_id: Name
    kind: MemoryKind
    occurred_at: Moment
    importance: Fraction
    rule: Literal["max_age", "importance_threshold"]
    state: Literal["planned", "requested", "archived", "skipped"]


class SweepReported(EventData):
    """A sweep and one page of what it names."""

    event_type: ClassVar[str] = "tessera.sweep.reported.v1"

    sweep_id: Name
    dry_run: bool
    state: Literal["planned", "running", "completed", "failed"]
    policy_version: Annotated[int, Field(ge=0)]
    planned: Annotated[int, Field(ge=0)]
    archived: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)]
    items: tuple[SweepItem, ...] = ()
    next_cursor: str | None = None
    created_at: Moment
    finished_at: Moment | None = None
    problem: Problem | None = None
