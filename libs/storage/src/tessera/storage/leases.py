"""Rows that are jobs: claimed one at a time under a lease, fair between tenants, fenced against late holders (docs/jobs.md)."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Row, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

_ONE_AT_A_TIME: Final = text("SELECT pg_advisory_xact_lock(hashtext(:name))")
_CLAIM: Final = """
    WITH tenants AS (
        SELECT tenant_id, max(claimed_at) AS served, count(*) FILTER (WHERE state = 'running' AND due_at > now()) AS leased
        FROM {table} WHERE tenant_id IN (SELECT tenant_id FROM {table} WHERE {claimable}) GROUP BY tenant_id
    ), due AS (
        SELECT tenant_id, {key} FROM {table} JOIN tenants USING (tenant_id)
        WHERE {claimable} AND (CAST(:tenant_limit AS bigint) IS NULL OR leased < :tenant_limit)
        ORDER BY served NULLS FIRST, due_at LIMIT 1 FOR UPDATE OF {table} SKIP LOCKED
    )
    UPDATE {table} AS job SET state = 'running', due_at = now() + :lease, claimed_at = clock_timestamp(), fence = job.fence + 1,
        attempts = job.attempts + 1
    FROM due WHERE job.tenant_id = due.tenant_id AND job.{key} = due.{key} RETURNING job.*
"""
_HOLD: Final = """
    UPDATE {table} SET due_at = now() + :lease
    WHERE tenant_id = :tenant_id AND {key} = :key AND fence = :fence AND state = 'running' RETURNING *
"""


@dataclass(frozen=True, slots=True)
class LeasedRows:
    """A table whose rows are jobs, in the schema of the service.

    Columns: tenant_id and `key` (the primary key), state, due_at (when a worker may take it; while one holds it, the end of its lease),
    claimed_at, fence (grows with every lease) and attempts. The names come from the service's own code, never from outside.
    """

    table: str
    key: str
    states: tuple[str, ...]
    """In which a row that is due may be claimed; `running` is among them, as that of a worker that died."""

    async def claim(self, connection: AsyncConnection, lease: timedelta, *, tenant_limit: int | None = None) -> Row[Any] | None:
        """Takes the due row of the tenant that was served longest ago, and gives back the whole of it; None if none is due.

        A tenant that holds `tenant_limit` leases gets no further one. Claims wait for one another, which makes both exact; a row that
        somebody works on is passed over.
        """
        await connection.execute(_ONE_AT_A_TIME, {"name": f"claim {self.table}"})
        values = {"lease": lease, "tenant_limit": tenant_limit}
        return (await connection.execute(self._statement(_CLAIM), values)).one_or_none()

    async def hold(self, connection: AsyncConnection, tenant_id: str, key: str, fence: int, lease: timedelta) -> Row[Any] | None:
        """Prolongs a lease and locks its row until the transaction ends; the row, or None once the lease is another's or the job over."""
        values = {"tenant_id": tenant_id, "key": key, "fence": fence, "lease": lease}
        return (await connection.execute(self._statement(_HOLD), values)).one_or_none()

    def _statement(self, template: str) -> TextClause:
        states = ", ".join(f"'{state}'" for state in self.states)
        return text(template.format(table=self.table, key=self.key, claimable=f"state IN ({states}) AND due_at <= now()"))
