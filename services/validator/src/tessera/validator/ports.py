"""What handlers and workers need from the world."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol

from tessera.bus import Origin
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import DatasetReference, ValidationReport, ValidationReported
from tessera.validator.domain.tables import Comparison

ValidationState = Literal["queued", "running", "completed", "failed"]


class LeaseLostError(RetryableError):
    """Another worker holds the validation now, or it was cancelled: whatever this one still wanted to write must not be written."""

    code = "lease_lost"


@dataclass(frozen=True, slots=True)
class Job:
    """A validation as it was asked for."""

    tenant_id: str
    validation_id: str
    candidate: DatasetReference
    reference: DatasetReference | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one validation until it lapses; `fence` is checked by every write."""

    job: Job
    fence: int
    attempts: int
    """Leases in a row that came to nothing, this one included."""


@dataclass(frozen=True, slots=True)
class LoadedComparison:
    """Two datasets over the columns that they share."""

    comparison: Comparison
    doubts: tuple[str, ...]
    """What was noticed on the way, such as columns that only the reference has."""


@dataclass(frozen=True, slots=True)
class LoadedCandidate:
    """A dataset without a reference: what it is, nothing about its values."""

    rows: int
    columns: tuple[str, ...]


class ValidationUnit(Protocol):
    """One event's unit of work; the bus commits it."""

    async def add(self, job: Job, created_at: datetime) -> bool:
        """Adds a validation that a worker will take up. False, and nothing changes, if its id was used for other datasets."""

    async def cancel(self, tenant_id: str, validation_id: str, problem: Problem) -> None:
        """Ends a validation that is not over, with this reason; whoever works on it can write nothing any more."""

    async def report(self, tenant_id: str, validation_id: str) -> ValidationReported | None:
        """Where a validation stands; None if there is no such one."""

    async def reply(self, data: EventData) -> None:
        """Answers the request being handled, when the transaction commits."""


class ValidationJobs(Protocol):
    """Leases on validations, across tenants. Every write raises LeaseLostError once another worker holds the lease."""

    async def claim(self) -> Lease | None:
        """Takes a validation that is due, of the tenant that was served longest ago; None if none is."""

    async def prolong(self, lease: Lease) -> None:
        """Keeps the lease for its full time again."""

    async def complete(self, lease: Lease, report: ValidationReport) -> None:
        """Stores the report and publishes ValidationCompleted."""

    async def fail(self, lease: Lease, problem: Problem) -> None:
        """Ends the validation without a report."""

    async def put_off(self, lease: Lease, delay: timedelta, *, spent: bool) -> None:
        """Gives the lease back; the validation is due again after `delay`. `spent`: the attempt counts against it."""


class DatasetReader(Protocol):
    """Datasets as arrays."""

    def loading(self, datasets: Sequence[DatasetReference]) -> AbstractAsyncContextManager[LoadedComparison | LoadedCandidate]:
        """Fetches and reads a candidate, or a candidate and its reference, away from the event loop.

        Raises InvalidError: `object_not_found`, `dataset_changed`, `dataset_too_large`, `dataset_unreadable`,
        `dataset_empty`, `no_common_columns`, `too_many_columns`; RetryableError while the object store does not answer.
        """
