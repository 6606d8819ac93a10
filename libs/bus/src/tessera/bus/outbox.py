"""Rows that a transaction wants published: written with the state, sent by the relay after the commit."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from uuid import UUID

from pydantic_core import from_json, to_json
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus.codec import Encoded
from tessera.contracts.values import value_class
from tessera.storage import DirectStatement, driver_of

_BASE64: Final = "base64"
_ESCAPED_NUL: Final = "\\u0000"


@value_class
class OutboxRow:
    """One record to be published. `topic` is the catalogue's name, or that of a dead-letter or refusal topic."""

    event_id: UUID | str
    topic: str
    key: bytes | None
    encoded: Encoded
    partition: int | None = None


INSERT: Final = (
    "INSERT INTO outbox (event_id, topic, partition, key, headers, value) "
    "SELECT event_id, topic, partition, key, CAST(headers AS jsonb), value "
    "FROM unnest(CAST(:event_ids AS uuid[]), CAST(:topics AS text[]), "
    "CAST(:partitions AS integer[]), CAST(:keys AS bytea[]), CAST(:headers AS text[]), CAST(:contents AS bytea[])) "
    "WITH ORDINALITY AS given (event_id, topic, partition, key, headers, value, place) ORDER BY place"
)
"""Takes the values that `columns` gives; part of a larger statement where a round trip counts."""
_INSERT = DirectStatement(INSERT)


async def write(connection: AsyncConnection, rows: Sequence[OutboxRow]) -> None:
    """Inserts the rows in order; the table's trigger wakes the relay when the transaction commits."""
    if rows:
        await _INSERT.rows(driver_of(connection), columns(rows))


def columns(rows: Sequence[OutboxRow]) -> dict[str, list[object]]:
    """The values of `INSERT`, by name."""
    return {
        "event_ids": [row.event_id for row in rows],
        "topics": [row.topic for row in rows],
        "partitions": [row.partition for row in rows],
        "keys": [row.key for row in rows],
        "headers": [pack_headers(row.encoded.headers) for row in rows],
        "contents": [row.encoded.value for row in rows],
    }


def pack_headers(headers: Sequence[tuple[str, bytes]]) -> str:
    """Headers as a JSON list, in order and with repeats; what is not plain text is Base64, so that any bytes survive."""
    with suppress(UnicodeDecodeError):
        packed = to_json([(name, (value or b"").decode()) for name, value in headers]).decode()
        if _ESCAPED_NUL not in packed:  # Postgres takes none
            return packed
    return to_json([_packed(name, value or b"") for name, value in headers]).decode()


def unpack_headers(packed: str) -> list[tuple[str, bytes]]:
    """The inverse of `pack_headers`."""
    return [(parts[0], parts[1].encode()) if len(parts) == 2 else (parts[0], base64.b64decode(parts[1])) for parts in from_json(packed)]


def _packed(name: str, value: bytes) -> tuple[str, ...]:
    if b"\x00" not in value and "\x00" not in name:
        try:
            return name, value.decode()
        except UnicodeDecodeError:
            pass
    return name.replace("\x00", ""), base64.b64encode(value).decode(), _BASE64
