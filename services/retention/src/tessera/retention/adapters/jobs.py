"""Leased sweeps in Postgres. A lease is `due_at` in the future; a fence number makes a late holder's writes impossible."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from sqlalchemy import text

from tessera.bus import Bus, Transaction
from tessera.contracts.errors import Problem
from tessera.contracts.events import ArchivedItem, ArchiveRequested
from tessera.contracts.ids import aggregate_key
from tessera.retention.adapters.rows import memory_of, named_of, origin_of, sweep_of
from tessera.retention.domain import DueMemory, MemoryMetadata, PlannedItem, SweepState
from tessera.retention.ports import Lease, LeaseLostError, Sweep
from tessera.storage import Database, LeasedRows

_ROWS: Final = LeasedRows("sweeps", "sweep_id", ("running",))
_MEMORIES: Final = text(
    """
    SELECT memory_id, kind, occurred_at, importance, version FROM memories
    WHERE tenant_id = :tenant_id AND memory_id > :cursor AND kind IS NOT NULL AND NOT archived ORDER BY memory_id LIMIT :limit
    """
)
_NAMED: Final = text(
    """
    SELECT memory_id, kind, occurred_at, importance, version, rule FROM sweep_items
    WHERE tenant_id = :tenant_id AND sweep_id = :plan_id AND memory_id > :cursor ORDER BY memory_id LIMIT :limit
    """
)
_ADD_ITEM: Final = text(
    """
    INSERT INTO sweep_items (tenant_id, sweep_id, memory_id, version, kind, occurred_at, importance, rule, state)
    VALUES (:tenant_id, :sweep_id, :memory_id, :version, :kind, :occurred_at, :importance, :rule, 'planned')
    ON CONFLICT DO NOTHING
    """
)
_PLANNED: Final = text(
    """
    UPDATE sweeps SET cursor = coalesce(:cursor, cursor), planned_at = CASE WHEN CAST(:cursor AS text) IS NULL THEN now() END, attempts = 0
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id
    """
)
_OPEN: Final = text(
    """
    SELECT i.memory_id, i.version, m.version AS current_version, coalesce(m.archived, false) AS archived
    FROM sweep_items i LEFT JOIN memories m USING (tenant_id, memory_id)
    WHERE i.tenant_id = :tenant_id AND i.sweep_id = :sweep_id AND i.state = 'planned'
    ORDER BY i.memory_id LIMIT :limit FOR UPDATE OF i
    """
)
_MARK: Final = text(
    """
    UPDATE sweep_items SET state = :state, reason = :reason
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id AND memory_id = :memory_id
    """
)
_ASKED: Final = text(
    """
    UPDATE sweeps SET chunks = chunks + 1, requested_at = CASE WHEN :last THEN now() END, attempts = 0
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id
    """
)
_UNCONFIRMED: Final = text("SELECT count(*) FROM sweep_items WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id AND state = 'requested'")
_FINISH: Final = text(
    """
    UPDATE sweeps SET state = :state, problem = CAST(:problem AS jsonb), finished_at = now()
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id
    """
)
_PAUSE: Final = text(
    """
    UPDATE sweeps SET due_at = now() + :delay, attempts = CASE WHEN :spent THEN attempts ELSE 0 END
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id
    """
)


class PostgresSweepJobs:
    """`SweepJobs` on the table sweeps."""

    def __init__(self, database: Database, bus: Bus, lease: timedelta) -> None:
        self._database = database
        self._bus = bus
        self._lease = lease

    async def claim(self) -> Lease | None:
        """See the port."""
        async with self._database.transaction() as connection:
            row = await _ROWS.claim(connection, self._lease)
        if row is None:
            return None
        return Lease(row.tenant_id, row.sweep_id, row.fence, row.attempts, origin_of(row.origin))

    @asynccontextmanager
    async def step(self, lease: Lease) -> AsyncIterator[PostgresSweepStep]:
        """See the port."""
        async with self._bus.transaction(lease.origin) as transaction:
            # Locks the row, so that nobody can claim or cancel the sweep until the step has committed.
            row = await _ROWS.hold(transaction.connection, lease.tenant_id, lease.sweep_id, lease.fence, self._lease)
            if row is None:
                raise LeaseLostError(f"the lease on sweep {lease.sweep_id} was lost")
            yield PostgresSweepStep(transaction, sweep_of(row))


class PostgresSweepStep:
    """`SweepStep` within one transaction of the bus."""

    def __init__(self, transaction: Transaction, sweep: Sweep) -> None:
        self._transaction = transaction
        self._connection = transaction.connection
        self._named = {"tenant_id": sweep.tenant_id, "sweep_id": sweep.sweep_id}
        self.sweep = sweep

    async def memories(self, limit: int) -> Sequence[MemoryMetadata]:
        """See the port."""
        values = {"tenant_id": self.sweep.tenant_id, "cursor": self.sweep.cursor, "limit": limit}
        return [memory_of(row) for row in await self._connection.execute(_MEMORIES, values)]

    async def named_by_plan(self, limit: int) -> Sequence[DueMemory]:
        """See the port."""
        values = {"tenant_id": self.sweep.tenant_id, "plan_id": self.sweep.plan_id, "cursor": self.sweep.cursor, "limit": limit}
        return [named_of(row) for row in await self._connection.execute(_NAMED, values)]

    async def plan(self, items: Sequence[DueMemory], *, cursor: str | None) -> None:
        """See the port."""
        if items:
            await self._connection.execute(_ADD_ITEM, [{**self._named, **_planned(item)} for item in items])
        await self._connection.execute(_PLANNED, {**self._named, "cursor": cursor})

    async def open_items(self, limit: int) -> Sequence[PlannedItem]:
        """See the port."""
        rows = await self._connection.execute(_OPEN, {**self._named, "limit": limit})
        return [PlannedItem(row.memory_id, row.version, row.current_version, row.archived) for row in rows]

    async def ask(self, requested: Sequence[ArchivedItem], skipped: Mapping[str, str], *, last: bool) -> None:
        """See the port."""
        marks = [{"memory_id": item.memory_id, "state": "requested", "reason": None} for item in requested]
        marks += [{"memory_id": memory_id, "state": "skipped", "reason": reason} for memory_id, reason in skipped.items()]
        if marks:
            await self._connection.execute(_MARK, [{**self._named, **mark} for mark in marks])
        if requested:
            await self._publish(requested)
        await self._connection.execute(_ASKED, {**self._named, "last": last})

    async def _publish(self, requested: Sequence[ArchivedItem]) -> None:
        data = ArchiveRequested(sweep_id=self.sweep.sweep_id, items=tuple(requested))
        key = aggregate_key(self.sweep.tenant_id, "sweep", self.sweep.sweep_id)
        await self._transaction.publish(data, step="archive", index=self.sweep.chunks, key=key)

    async def unconfirmed(self) -> int:
        """See the port."""
        return int(await self._connection.scalar(_UNCONFIRMED, self._named) or 0)

    async def finish(self, state: SweepState, problem: Problem | None = None) -> None:
        """See the port."""
        values = {"state": state, "problem": problem.model_dump_json() if problem else None}
        await self._connection.execute(_FINISH, {**self._named, **values})

    async def pause(self, delay: timedelta, *, spent: bool = False) -> None:
        """See the port."""
        await self._connection.execute(_PAUSE, {**self._named, "delay": delay, "spent": spent})


def _planned(item: DueMemory) -> dict[str, object]:
    memory = item.memory
    return {
        "memory_id": memory.memory_id,
        "version": memory.version,
        "kind": memory.kind,
        "occurred_at": memory.occurred_at,
        "importance": memory.importance,
        "rule": item.rule,
    }
