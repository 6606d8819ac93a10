"""Answers that can be asked for again, in Postgres."""

from datetime import timedelta
from typing import Any

from sqlalchemy import text

from tessera.gateway.ports import KeptAnswer, Repeat
from tessera.storage import Database

_CLAIM = text("""
    INSERT INTO idempotent_answers AS kept (tenant_id, operation, key, body_digest, leased_until)
    VALUES (:tenant_id, :operation, :key, :body_digest, now() + CAST(:lease AS interval))
    ON CONFLICT (tenant_id, operation, key) DO UPDATE SET leased_until = excluded.leased_until
    WHERE kept.answer IS NULL AND kept.leased_until < now() AND kept.body_digest = excluded.body_digest
""")
_FIND = text("""
    SELECT body_digest = :body_digest AS same_body, status, answer FROM idempotent_answers
    WHERE tenant_id = :tenant_id AND operation = :operation AND key = :key
""")
_KEEP = text("""
    UPDATE idempotent_answers SET status = :status, answer = :answer
    WHERE tenant_id = :tenant_id AND operation = :operation AND key = :key AND answer IS NULL
""")
_RELEASE = text("""
    DELETE FROM idempotent_answers WHERE tenant_id = :tenant_id AND operation = :operation AND key = :key AND answer IS NULL
""")
_EXPIRE = text("""
    DELETE FROM idempotent_answers WHERE (tenant_id, operation, key) IN (
        SELECT tenant_id, operation, key FROM idempotent_answers WHERE created_at < now() - CAST(:age AS interval)
        ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED
    )
""")


class PostgresAnswers:
    """Implements `ports.Answers`. Requests use the client role; only the loop sees every tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, tenant_id: str, repeat: Repeat, lease: timedelta) -> KeptAnswer:
        """One transaction; a row that was released in between is looked for again."""
        values = _place(tenant_id, repeat)
        while True:
            async with self._database.writing(tenant_id) as connection:
                taken = await connection.execute(_CLAIM, {**values, "body_digest": repeat.body_digest, "lease": lease})
                found = (await connection.execute(_FIND, {**values, "body_digest": repeat.body_digest})).mappings().one_or_none()
            if found is not None:
                return KeptAnswer(taken.rowcount == 1, **found)

    async def keep(self, tenant_id: str, repeat: Repeat, status: int, answer: str) -> None:
        """One update."""
        async with self._database.writing(tenant_id) as connection:
            await connection.execute(_KEEP, {**_place(tenant_id, repeat), "status": status, "answer": answer})

    async def release(self, tenant_id: str, repeat: Repeat) -> None:
        """One delete."""
        async with self._database.writing(tenant_id) as connection:
            await connection.execute(_RELEASE, _place(tenant_id, repeat))

    async def expire(self, age: timedelta, limit: int) -> int:
        """One delete."""
        async with self._database.transaction() as connection:
            return (await connection.execute(_EXPIRE, {"age": age, "limit": limit})).rowcount


def _place(tenant_id: str, repeat: Repeat) -> dict[str, Any]:
    return {"tenant_id": tenant_id, "operation": repeat.operation, "key": repeat.key}
