"""The inbox: each identity takes effect once per consumer, whoever repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.contracts.values import value_class
from tessera.storage import DirectStatement, driver_of


class Entry(Enum):
    """What the inbox says about an event."""

    NEW = "new"
    REPEATED = "repeated"
    """The same identity with the same body: handled before."""
    REUSED = "reused"
    """The same identity with another body."""


@value_class
class InboxItem:
    """One event's identity and body, 16 bytes each."""

    tenant_id: str
    identity: bytes
    body: bytes


# Which of them are new is told only where not all are, which is rare: a row for each costs as much as the rest.
_INSERT = DirectStatement(
    "WITH written AS (INSERT INTO inbox (tenant_id, consumer, identity, body) "
    "SELECT tenant_id, CAST(:consumer AS text), identity, body "
    "FROM unnest(CAST(:tenants AS text[]), CAST(:identities AS bytea[]), CAST(:bodies AS bytea[])) AS given (tenant_id, identity, body) "
    "ON CONFLICT DO NOTHING RETURNING tenant_id, identity) "
    "SELECT count(*) = cardinality(CAST(:tenants AS text[])) AS complete, "
    "CASE WHEN count(*) < cardinality(CAST(:tenants AS text[])) THEN array_agg(tenant_id) END AS tenants, "
    "CASE WHEN count(*) < cardinality(CAST(:tenants AS text[])) THEN array_agg(identity) END AS identities FROM written"
)
_FIND = text(
    "SELECT inbox.tenant_id, inbox.identity, inbox.body FROM inbox "
    "JOIN unnest(CAST(:tenants AS text[]), CAST(:identities AS bytea[])) AS given (tenant_id, identity) "
    "ON inbox.tenant_id = given.tenant_id AND inbox.identity = given.identity WHERE inbox.consumer = :consumer AND inbox.generation = 1"
)
_FORGET = text(
    "DELETE FROM inbox USING unnest(CAST(:tenants AS text[]), CAST(:identities AS bytea[])) AS given (tenant_id, identity) "
    "WHERE inbox.tenant_id = given.tenant_id AND inbox.identity = given.identity AND inbox.consumer = :consumer AND inbox.generation = 1"
)


async def enter(connection: AsyncConnection, consumer: str, items: Sequence[InboxItem]) -> list[Entry]:
    """Writes the identities of a batch and says of each, in order, whether it is new; the first of equal ones in the batch is."""
    if not items:
        return []
    values = {"consumer": consumer, **_columns(items), "bodies": [item.body for item in items]}
    written = await _INSERT.row(driver_of(connection), values)
    if written["complete"]:
        return [Entry.NEW] * len(items)
    new = set(zip(written["tenants"] or (), written["identities"] or (), strict=True))
    found = await connection.execute(_FIND, {"consumer": consumer, **_columns(items)})
    known = {(row.tenant_id, bytes(row.identity)): bytes(row.body) for row in found}
    return [_entry(item, new, known) for item in items]


async def forget(connection: AsyncConnection, consumer: str, items: Sequence[InboxItem]) -> None:
    """Takes entries back: what was refused had no effect, and must have one when an operator replays it."""
    if items:
        await connection.execute(_FORGET, {"consumer": consumer, **_columns(items)})


def _columns(items: Sequence[InboxItem]) -> dict[str, object]:
    return {"tenants": [item.tenant_id for item in items], "identities": [item.identity for item in items]}


def _entry(item: InboxItem, new: set[tuple[str, bytes]], known: dict[tuple[str, bytes], bytes]) -> Entry:
    identity = (item.tenant_id, item.identity)
    if known.get(identity, item.body) != item.body:
        return Entry.REUSED
    if identity in new:
        new.discard(identity)
        return Entry.NEW
    return Entry.REPEATED
