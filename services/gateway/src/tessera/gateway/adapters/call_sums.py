"""How many calls there were, in Postgres."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import TextClause, text

from tessera.gateway.domain.calls import CallRow, Counted
from tessera.gateway.ports import CallQuestion
from tessera.storage import Database

_NOTE = text("""
    INSERT INTO calls_added (tenant_id, id) SELECT unnest(CAST(:tenants AS text[])), CAST(:id AS uuid) ON CONFLICT DO NOTHING RETURNING 1
""")
_FORGET = text("DELETE FROM calls_added WHERE added_at < now() - interval '1 day'")
_ADD = text("""
    INSERT INTO calls_by_day AS total (tenant_id, day, credential_id, operation, requests, errors)
    VALUES (:tenant_id, :day, :credential_id, :operation, :requests, :errors)
    ON CONFLICT (tenant_id, day, credential_id, operation) DO UPDATE SET
        requests = total.requests + excluded.requests, errors = total.errors + excluded.errors
""")
_GROUPS: Final = ("day", "credential_id", "operation")


def _sums(groups: Sequence[str]) -> TextClause:
    """The groups are part of the statement; all else is a parameter."""
    chosen = ", ".join(group if group in groups else f"NULL AS {group}" for group in _GROUPS)
    grouped = f"GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}" if groups else "HAVING count(*) > 0"
    return text(f"""
        SELECT {chosen}, CAST(sum(requests) AS bigint) AS requests, CAST(sum(errors) AS bigint) AS errors FROM calls_by_day
        WHERE tenant_id = :tenant_id AND day >= :since AND day <= :until
        AND (CAST(:operation AS text) IS NULL OR operation = :operation)
        AND (CAST(:credential_id AS text) IS NULL OR credential_id = :credential_id)
        {grouped} LIMIT :limit
    """)  # noqa: S608


class PostgresCallSums:
    """Implements `ports.CallSums`. Requests use the client role; only the loop writes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, counts_id: UUID, *rows: tuple[Counted, int, int]) -> None:
        """One transaction; nothing where it was committed before."""
        tenants = sorted({counted.tenant_id for counted, _, _ in rows})
        values = [{**vars(counted), "requests": requests, "errors": errors} for counted, requests, errors in rows]
        async with self._database.transaction() as connection:
            added = (await connection.execute(_NOTE, {"tenants": tenants, "id": counts_id})).first()
            if added is None:
                return
            await connection.execute(_ADD, values)
            await connection.execute(_FORGET)

    async def sums(self, tenant_id: str, question: CallQuestion) -> Sequence[CallRow]:
        """One read."""
        values: dict[str, Any] = {"tenant_id": tenant_id, **vars(question)}
        values.pop("groups")
        async with self._database.reading(tenant_id) as connection:
            rows = await connection.execute(_sums(question.groups), values)
            return [CallRow(**row) for row in rows.mappings()]
