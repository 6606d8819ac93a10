"""The projection, policies and sweeps in Postgres, within the transaction of the event being handled."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import Transaction
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem
from tessera.contracts.events import MemoryChanged, MemoryRecorded, SweepItem, SweepReported
from tessera.retention.adapters.audit import PostgresAuditEvents
from tessera.retention.adapters.rows import origin_json, policy_of, sweep_of
from tessera.retention.domain import ItemState
from tessera.retention.ports import PolicyInForce, Sweep

_RECORD: Final = text(
    """
    INSERT INTO memories (tenant_id, memory_id, subject_id, kind, occurred_at, recorded_at, importance, version)
    VALUES (:tenant_id, :memory_id, :subject_id, :kind, :occurred_at, :recorded_at, :importance, :version)
    ON CONFLICT (tenant_id, memory_id) DO UPDATE SET
        subject_id = excluded.subject_id, kind = excluded.kind, occurred_at = excluded.occurred_at,
        recorded_at = excluded.recorded_at, importance = excluded.importance,
        archived = memories.archived AND memories.version >= excluded.version,
        version = greatest(memories.version, excluded.version)
    WHERE memories.kind IS NULL OR memories.version < excluded.version
    """
)
_ARCHIVED: Final = text(
    """
    INSERT INTO memories (tenant_id, memory_id, version, archived) VALUES (:tenant_id, :memory_id, :version, true)
    ON CONFLICT (tenant_id, memory_id) DO UPDATE SET version = excluded.version, archived = true
    WHERE memories.version <= excluded.version
    """
)
_SKIPPED: Final = text(
    "UPDATE memories SET version = :version WHERE tenant_id = :tenant_id AND memory_id = :memory_id AND version < :version"
)
_CONFIRM: Final = text(
    """
    UPDATE sweep_items SET state = :state, reason = :reason
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id AND memory_id = :memory_id AND state = 'requested'
    """
)
_POLICY: Final = text("SELECT * FROM policies WHERE tenant_id = :tenant_id ORDER BY version DESC LIMIT 1")
_ADD_POLICY: Final = text(
    "INSERT INTO policies (tenant_id, version, policy, updated_at) VALUES (:tenant_id, :version, CAST(:policy AS jsonb), :updated_at)"
)
_SWEEP: Final = text("SELECT * FROM sweeps WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id")
_ADD_SWEEP: Final = text(
    """
    INSERT INTO sweeps (
        tenant_id, sweep_id, dry_run, plan_id, state, policy_version, policy, as_of, origin, problem, created_at, finished_at
    )
    VALUES (:tenant_id, :sweep_id, :dry_run, :plan_id, :state, :policy_version, CAST(:policy AS jsonb), :as_of,
            CAST(:origin AS jsonb), CAST(:problem AS jsonb), :as_of, CASE WHEN :failed THEN now() END)
    """
)
_CANCEL: Final = text(
    """
    UPDATE sweeps SET state = 'failed', problem = CAST(:problem AS jsonb), finished_at = now(), fence = fence + 1
    WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id AND state = 'running'
    """
)
_COUNTS: Final = text(
    """
    SELECT count(*) AS planned, count(*) FILTER (WHERE state = 'archived') AS archived, count(*) FILTER (WHERE state = 'skipped') AS skipped
    FROM sweep_items WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id
    """
)
_ITEMS: Final = text(
    """
    SELECT * FROM sweep_items WHERE tenant_id = :tenant_id AND sweep_id = :sweep_id AND memory_id > :after
    ORDER BY memory_id LIMIT :limit
    """
)


class PostgresProjection:
    """`Projection` on the tables memories and sweep_items."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def record(self, tenant_id: str, subject_id: str | None, memory: MemoryRecorded) -> None:
        """See the port."""
        values = memory.model_dump(include={"memory_id", "kind", "occurred_at", "recorded_at", "importance", "version"})
        await self._connection.execute(_RECORD, {"tenant_id": tenant_id, "subject_id": subject_id, **values})

    async def change(self, tenant_id: str, change: MemoryChanged) -> None:
        """See the port."""
        archived = change.change == "archived"
        named = {"tenant_id": tenant_id, "memory_id": change.memory_id}
        await self._connection.execute(_ARCHIVED if archived else _SKIPPED, {**named, "version": change.version})
        if change.sweep_id is None:
            return
        state = ItemState.ARCHIVED if archived else ItemState.SKIPPED
        await self._connection.execute(_CONFIRM, {**named, "sweep_id": change.sweep_id, "state": state.value, "reason": change.reason})


class PostgresPolicies:
    """`Policies` on the table policies."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def in_force(self, tenant_id: str) -> PolicyInForce | None:
        """See the port."""
        row = (await self._connection.execute(_POLICY, {"tenant_id": tenant_id})).one_or_none()
        return PolicyInForce(policy_of(row.policy), row.version, row.updated_at) if row else None

    async def add(self, tenant_id: str, policy: PolicyInForce) -> None:
        """See the port."""
        values = {"version": policy.version, "policy": policy.policy.model_dump_json(), "updated_at": policy.updated_at}
        await self._connection.execute(_ADD_POLICY, {"tenant_id": tenant_id, **values})


class PostgresSweeps:
    """`Sweeps` on the tables sweeps and sweep_items."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def find(self, tenant_id: str, sweep_id: str) -> Sweep | None:
        """See the port."""
        row = await self._row(tenant_id, sweep_id)
        return sweep_of(row) if row else None

    async def add(self, sweep: Sweep) -> None:
        """See the port."""
        values = {
            "tenant_id": sweep.tenant_id,
            "sweep_id": sweep.sweep_id,
            "dry_run": sweep.dry_run,
            "plan_id": sweep.plan_id,
            "policy_version": sweep.policy_version,
            "policy": sweep.policy.model_dump_json() if sweep.policy else None,
            "as_of": sweep.as_of,
            "origin": origin_json(sweep.origin),
            "state": sweep.state,
            "problem": sweep.problem.model_dump_json() if sweep.problem else None,
            "failed": sweep.problem is not None,
        }
        await self._connection.execute(_ADD_SWEEP, values)

    async def cancel(self, tenant_id: str, sweep_id: str, problem: Problem) -> None:
        """See the port. The fence grows, so that a worker that does not know it yet writes nothing."""
        values = {"tenant_id": tenant_id, "sweep_id": sweep_id, "problem": problem.model_dump_json()}
        await self._connection.execute(_CANCEL, values)

    async def report(self, tenant_id: str, sweep_id: str, *, after: str | None, limit: int) -> SweepReported | None:
        """See the port."""
        row = await self._row(tenant_id, sweep_id)
        if row is None:
            return None
        named = {"tenant_id": tenant_id, "sweep_id": sweep_id}
        counts = (await self._connection.execute(_COUNTS, named)).one()
        found = (await self._connection.execute(_ITEMS, {**named, "after": after or "", "limit": limit + 1})).all()
        items = tuple(_item(item) for item in found[:limit])
        sweep = sweep_of(row)
        return SweepReported(
            sweep_id=sweep_id,
            dry_run=row.dry_run,
            state=row.state,
            policy_version=row.policy_version,
            planned=counts.planned,
            archived=counts.archived,
            skipped=counts.skipped,
            items=items,
            next_cursor=items[-1].memory_id if len(found) > limit else None,
            created_at=row.created_at,
            finished_at=row.finished_at,
            problem=sweep.problem,
        )

    async def _row(self, tenant_id: str, sweep_id: str) -> Any:
        return (await self._connection.execute(_SWEEP, {"tenant_id": tenant_id, "sweep_id": sweep_id})).one_or_none()


def _item(row: Any) -> SweepItem:
    return SweepItem(
        memory_id=row.memory_id, kind=row.kind, occurred_at=row.occurred_at, importance=row.importance, rule=row.rule, state=row.state
    )


class PostgresUnit:
    """`RetentionUnit` on the transaction that the bus opened."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self.projection = PostgresProjection(transaction.connection)
        self.policies = PostgresPolicies(transaction.connection)
        self.sweeps = PostgresSweeps(transaction.connection)
        self.audit = PostgresAuditEvents(transaction.connection)

    async def reply(self, data: EventData) -> None:
        """See the port."""
        await self._transaction.reply(data)
