"""Refused events, kept so that their producers can ask for the reason."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.contracts.events import EventRefused

_UPSERT = text("""
    INSERT INTO refusal (tenant_id, event_id, source, code, message, field) VALUES (:tenant, :event, :source, :code, :message, :field)
    ON CONFLICT (tenant_id, event_id, source) DO UPDATE SET code = excluded.code, message = excluded.message, field = excluded.field
""")


async def note_refusal(tenant_id: str, refused: EventRefused, connection: AsyncConnection) -> None:
    """Keeps the reason under the id that the producer gave; an event without an id cannot be asked for."""
    if not refused.refused_id:
        return
    reason = refused.reason
    values = {"code": reason.code, "message": _clean(reason.message), "field": _clean(reason.param)}
    await connection.execute(
        _UPSERT, {"tenant": tenant_id, "event": _clean(refused.refused_id), "source": _clean(refused.refused_source), **values}
    )


def _clean(value: str | None) -> str | None:
    """Postgres text cannot hold U+0000; a refused event may."""
    return value.replace("\x00", "�") if value is not None else None
