"""The audit trail in Postgres: a table that nobody can change a row of."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.contracts.errors import InvalidError
from tessera.contracts.events import AuditEntry, AuditInspected, AuditRecorded
from tessera.retention.ports import AuditPage
from tessera.storage import Database

_ADD: Final = text(
    """
    INSERT INTO audit_events (tenant_id, source, event_id, occurred_at, action, actor_id, target_id, record)
    VALUES (:tenant_id, :source, :event_id, :occurred_at, :action, :actor_id, :target_id, CAST(:record AS jsonb))
    ON CONFLICT DO NOTHING
    """
)
_CONDITIONS: Final = {
    "tenant": "tenant_id = :tenant",
    "actor": "actor_id = :actor",
    "action": "action = :action",
    "target": "target_id = :target",
    "since": "occurred_at >= :since",
    "until": "occurred_at < :until",
}
_AFTER: Final = "(occurred_at, event_id) < (:after_at, :after_id)"
_CURSOR: Final = re.compile(r"(?P<microseconds>[0-9]{1,17})\.(?P<event_id>[!-~]{1,128})")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class PostgresAuditEvents:
    """`AuditEvents` on the table audit_events."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def append(self, source: str, event_id: str, act: AuditRecorded) -> None:
        """See the port."""
        values = {
            "tenant_id": act.tenant,
            "source": source,
            "event_id": event_id,
            "occurred_at": act.occurred_at,
            "action": act.action,
            "actor_id": act.actor.id,
            "target_id": act.target.id if act.target else None,
            "record": act.model_dump_json(),
        }
        await self._connection.execute(_ADD, values)


class PostgresAuditTrail:
    """`AuditTrail` on the table audit_events. A tenant's question is asked in the role to which no other tenant's row exists."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(self, tenant_id: str, question: AuditInspected) -> AuditPage:
        """See the port."""
        tenant = question.tenant if question.whole_platform else tenant_id
        wanted = {**dict(question), "tenant": tenant}
        given = {name: wanted[name] for name in _CONDITIONS if wanted[name] is not None}
        conditions = [_CONDITIONS[name] for name in given]
        if question.after is not None:
            conditions.append(_AFTER)
            given |= _place(question.after)
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        statement = f"SELECT event_id, record FROM audit_events {where} ORDER BY occurred_at DESC, event_id DESC LIMIT :limit"  # noqa: S608
        async with self._reading(None if question.whole_platform else tenant_id) as connection:
            rows = (await connection.execute(text(statement), {**given, "limit": question.limit + 1})).all()
        entries = [_entry(row) for row in rows[: question.limit]]
        return AuditPage(entries, _cursor(entries[-1]) if len(rows) > question.limit else None)

    @asynccontextmanager
    async def _reading(self, tenant_id: str | None) -> AsyncIterator[AsyncConnection]:
        transaction = self._database.transaction() if tenant_id is None else self._database.reading(tenant_id)
        async with transaction as connection:
            yield connection


def _entry(row: Any) -> AuditEntry:
    record = row.record if isinstance(row.record, dict) else json.loads(row.record)
    return AuditEntry(id=row.event_id, record=AuditRecorded.model_validate(record, extra="ignore"))


def _cursor(entry: AuditEntry) -> str:
    return f"{(entry.record.occurred_at - _EPOCH) // timedelta(microseconds=1)}.{entry.id}"


def _place(cursor: str) -> dict[str, Any]:
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise InvalidError("invalid_value", "There is no such cursor.", "after")
    return {"after_at": _EPOCH + timedelta(microseconds=int(found["microseconds"])), "after_id": found["event_id"]}
