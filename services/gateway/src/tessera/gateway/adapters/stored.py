"""Chats that are kept, in Postgres."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import RowMapping, TextClause, text

from tessera.gateway.domain.records import Since
from tessera.gateway.ports import NewStored, Stored, StoredPage
from tessera.storage import Database

_COLUMNS: Final = "tenant_id, id, model, metadata::text AS metadata, request, answer, reply_partition, reply_offset, created_at"
_BEGIN = text("""
    INSERT INTO stored_completions
        (tenant_id, id, model, metadata, request, subject_id, reply_partition, reply_offset, created_at, look_at)
    VALUES (:tenant_id, :id, :model, CAST(:metadata AS jsonb), :request, :subject_id, :partition, :offset, :created_at, :look_at)
    ON CONFLICT DO NOTHING
""")
_ANSWER = text("UPDATE stored_completions SET answer = :answer WHERE tenant_id = :tenant_id AND id = :id AND answer IS NULL")
_GIVE_UP = text("DELETE FROM stored_completions WHERE tenant_id = :tenant_id AND id = :id AND answer IS NULL")
_DELETE = text("DELETE FROM stored_completions WHERE tenant_id = :tenant_id AND id = :id RETURNING answer IS NOT NULL AS shown")
_FIND = text(f"SELECT {_COLUMNS} FROM stored_completions WHERE tenant_id = :tenant_id AND id = :id AND answer IS NOT NULL")  # noqa: S608
_LABEL = text(f"""
    UPDATE stored_completions SET metadata = CAST(:metadata AS jsonb)
    WHERE tenant_id = :tenant_id AND id = :id AND answer IS NOT NULL RETURNING {_COLUMNS}
""")  # noqa: S608
_OVERDUE = text(f"""
    UPDATE stored_completions SET look_at = now() + CAST(:again AS interval)
    WHERE (tenant_id, id) IN (
        SELECT tenant_id, id FROM stored_completions WHERE answer IS NULL AND look_at <= now()
        ORDER BY look_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ) RETURNING {_COLUMNS}
""")  # noqa: S608
_EXPIRE = text("""
    DELETE FROM stored_completions WHERE (tenant_id, id) IN (
        SELECT tenant_id, id FROM stored_completions WHERE created_at < now() - CAST(:age AS interval)
        ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED
    )
""")


def _page(*, newest_first: bool) -> TextClause:
    """The order is part of the statement; all else is a parameter."""
    beyond, direction = ("<", "DESC") if newest_first else (">", "ASC")
    return text(f"""
        SELECT {_COLUMNS} FROM stored_completions
        WHERE tenant_id = :tenant_id AND answer IS NOT NULL AND metadata @> CAST(:metadata AS jsonb)
        AND (CAST(:model AS text) IS NULL OR model = :model)
        AND (CAST(:after AS text) IS NULL OR (created_at, id) {beyond} (
            SELECT created_at, id FROM stored_completions WHERE tenant_id = :tenant_id AND id = :after
        ))
        ORDER BY created_at {direction}, id {direction} LIMIT :limit
    """)  # noqa: S608


_OLDEST_FIRST, _NEWEST_FIRST = _page(newest_first=False), _page(newest_first=True)


class PostgresStoredCompletions:
    """Implements `ports.StoredCompletions`. Requests use the client role; only the loops see every tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, tenant_id: str, new: NewStored) -> None:
        """Writes the row, unless it is there."""
        values = {**vars(new), "metadata": _json(new.metadata), "partition": new.since.partition, "offset": new.since.offset}
        values.pop("since")
        async with self._database.writing(tenant_id) as connection:
            await connection.execute(_BEGIN, {"tenant_id": tenant_id, **values})

    async def answer(self, tenant_id: str, completion_id: str, answer: str) -> None:
        """Sets the answer where there is none yet."""
        async with self._database.writing(tenant_id) as connection:
            await connection.execute(_ANSWER, {"tenant_id": tenant_id, "id": completion_id, "answer": answer})

    async def give_up(self, tenant_id: str, completion_id: str) -> None:
        """Deletes the row if it has no answer."""
        async with self._database.writing(tenant_id) as connection:
            await connection.execute(_GIVE_UP, {"tenant_id": tenant_id, "id": completion_id})

    async def find(self, tenant_id: str, completion_id: str) -> Stored | None:
        """One that has its answer."""
        async with self._database.reading(tenant_id) as connection:
            row = (await connection.execute(_FIND, {"tenant_id": tenant_id, "id": completion_id})).mappings().one_or_none()
        return None if row is None else _stored(row)

    async def page(self, tenant_id: str, wanted: StoredPage) -> Sequence[Stored] | None:
        """By the time of the request, then by id; both reads see the same moment."""
        values: dict[str, Any] = {"tenant_id": tenant_id, "metadata": _json(wanted.metadata)}
        values |= {"model": wanted.model, "after": wanted.after, "limit": wanted.limit}
        async with self._database.reading(tenant_id) as connection:
            if wanted.after is not None:
                known = await connection.execute(_FIND, {"tenant_id": tenant_id, "id": wanted.after})
                if known.first() is None:
                    return None
            rows = await connection.execute(_NEWEST_FIRST if wanted.newest_first else _OLDEST_FIRST, values)
            return [_stored(row) for row in rows.mappings()]

    async def label(self, tenant_id: str, completion_id: str, metadata: Mapping[str, str]) -> Stored | None:
        """Replaces the metadata."""
        values = {"tenant_id": tenant_id, "id": completion_id, "metadata": _json(metadata)}
        async with self._database.writing(tenant_id) as connection:
            row = (await connection.execute(_LABEL, values)).mappings().one_or_none()
        return None if row is None else _stored(row)

    async def delete(self, tenant_id: str, completion_id: str) -> bool:
        """Also one whose end is not known yet, although nobody is told that it was there."""
        async with self._database.writing(tenant_id) as connection:
            shown: bool | None = await connection.scalar(_DELETE, {"tenant_id": tenant_id, "id": completion_id})
        return bool(shown)

    async def overdue(self, limit: int, again: timedelta) -> Sequence[Stored]:
        """Of any tenant; two replicas never get the same row."""
        async with self._database.transaction() as connection:
            rows = await connection.execute(_OVERDUE, {"limit": limit, "again": again})
            return [_stored(row) for row in rows.mappings()]

    async def expire(self, age: timedelta, limit: int) -> int:
        """One delete."""
        async with self._database.transaction() as connection:
            return (await connection.execute(_EXPIRE, {"age": age, "limit": limit})).rowcount


def _json(metadata: Mapping[str, str]) -> str:
    return json.dumps(dict(metadata))


def _stored(row: RowMapping) -> Stored:
    values: dict[str, Any] = dict(row)
    since = Since(values.pop("reply_partition"), values.pop("reply_offset"))
    return Stored(**{**values, "metadata": json.loads(values["metadata"])}, since=since)
