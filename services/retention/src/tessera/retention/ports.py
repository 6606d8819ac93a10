"""What handlers and workers need from the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from tessera.bus import Origin
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import (
    ArchivedItem,
    AuditEntry,
    AuditInspected,
    AuditRecorded,
    MemoryChanged,
    MemoryRecorded,
    RetentionPolicy,
    SweepReported,
)
from tessera.retention.domain import DueMemory, MemoryMetadata, PlannedItem, SweepState


class LeaseLostError(RetryableError):
    """Another worker holds the sweep now, or it was cancelled: whatever this one still wanted to write must not be written."""

    code = "lease_lost"


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """A tenant's policy and which version of it this is, counted from 1."""

    policy: RetentionPolicy
    version: int
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as its row says."""

    tenant_id: str
    sweep_id: str
    dry_run: bool
    plan_id: str | None
    state: SweepState
    policy_version: int
    policy: RetentionPolicy | None
    """None where a plan is carried out: the plan's policy named the items."""
    as_of: datetime
    """Ages are counted to this moment, so that a resumed sweep plans what an uninterrupted one would."""
    origin: Origin
    cursor: str = ""
    """Last memory looked at while planning."""
    planned: bool = False
    chunks: int = 0
    """Archive requests sent so far."""
    requested_at: datetime | None = None
    """When the last of them was sent."""
    problem: Problem | None = None
    """Why it failed."""

    @property
    def wanted(self) -> tuple[bool, str | None]:
        """What the requester asked for; the same id may not ask for something else."""
        return self.dry_run, self.plan_id


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one sweep until it lapses; `fence` is checked by every write."""

    tenant_id: str
    sweep_id: str
    fence: int
    attempts: int
    """Leases in a row that came to nothing, this one included."""
    origin: Origin


class Answers(Protocol):
    """The transaction's outgoing side."""

    async def reply(self, data: EventData) -> None:
        """Answers the request being handled, when the transaction commits."""


class Projection(Protocol):
    """What memory told, within one transaction."""

    async def record(self, tenant_id: str, subject_id: str | None, memory: MemoryRecorded) -> None:
        """Keeps the metadata of a recorded memory; an older version than the known one changes nothing."""

    async def change(self, tenant_id: str, change: MemoryChanged) -> None:
        """Keeps a memory's new version, and confirms the item of the sweep that asked for it."""


class Policies(Protocol):
    """Policies within one transaction."""

    async def in_force(self, tenant_id: str) -> PolicyInForce | None:
        """The newest version; None for a tenant that never set one."""

    async def add(self, tenant_id: str, policy: PolicyInForce) -> None:
        """Adds a version."""


class Sweeps(Protocol):
    """Sweeps within one transaction, for the requester."""

    async def find(self, tenant_id: str, sweep_id: str) -> Sweep | None:
        """The sweep, or None."""

    async def add(self, sweep: Sweep) -> None:
        """Adds a sweep that a worker will take up."""

    async def cancel(self, tenant_id: str, sweep_id: str, problem: Problem) -> None:
        """Ends a sweep that is not over, with this reason; whoever works on it can write nothing any more."""

    async def report(self, tenant_id: str, sweep_id: str, *, after: str | None, limit: int) -> SweepReported | None:
        """The sweep with up to `limit` of its items in order of memory id; None if there is no such sweep."""


class AuditEvents(Protocol):
    """The audit trail within one transaction."""

    async def append(self, source: str, event_id: str, act: AuditRecorded) -> None:
        """Adds an act; one that is there already stays as it is."""


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Some acts, the newest first, and where to go on."""

    entries: Sequence[AuditEntry]
    next_cursor: str | None


class AuditTrail(Protocol):
    """The audit trail, for whoever asks after it."""

    async def page(self, tenant_id: str, question: AuditInspected) -> AuditPage:
        """What was done to this tenant, or to any where the question says so. Raises InvalidError `invalid_value` for a false cursor."""


class RetentionUnit(Answers, Protocol):
    """One event's unit of work; the bus commits it."""

    @property
    def projection(self) -> Projection:
        """What memory told."""

    @property
    def policies(self) -> Policies:
        """Policies of tenants."""

    @property
    def sweeps(self) -> Sweeps:
        """Sweeps of tenants."""

    @property
    def audit(self) -> AuditEvents:
        """What was done."""


class SweepStep(Protocol):
    """One step of a leased sweep: one transaction in which the lease is held and the fence was checked."""

    @property
    def sweep(self) -> Sweep:
        """The sweep as it stood when the step began."""

    async def memories(self, limit: int) -> Sequence[MemoryMetadata]:
        """Active memories after the sweep's cursor, in order of their ids."""

    async def named_by_plan(self, limit: int) -> Sequence[DueMemory]:
        """Items of the sweep's plan after its cursor, in order of memory ids."""

    async def plan(self, items: Sequence[DueMemory], *, cursor: str | None) -> None:
        """Adds items and moves the cursor; None says that planning is done."""

    async def open_items(self, limit: int) -> Sequence[PlannedItem]:
        """Planned items with what is known of their memories now, locked."""

    async def ask(self, requested: Sequence[ArchivedItem], skipped: Mapping[str, str], *, last: bool) -> None:
        """Asks memory to archive (one event, if there is anything to ask) and marks the items."""

    async def unconfirmed(self) -> int:
        """Items that memory has not answered for."""

    async def finish(self, state: SweepState, problem: Problem | None = None) -> None:
        """Ends the sweep."""

    async def pause(self, delay: timedelta, *, spent: bool = False) -> None:
        """Gives the lease back; the sweep is due again after `delay`. `spent`: the attempt counts against it."""


class SweepJobs(Protocol):
    """Leases on sweeps, across tenants."""

    async def claim(self) -> Lease | None:
        """Takes a sweep that is due, of the tenant that was served longest ago; None if none is."""

    def step(self, lease: Lease) -> AbstractAsyncContextManager[SweepStep]:
        """Opens one step and prolongs the lease. Raises LeaseLostError; commits when the block ends."""
