"""The queue of index work, and the two indexes it feeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import faults
from tessera.memory.adapters import lexical
from tessera.memory.adapters.sql import turn_of, vector_text
from tessera.memory.domain import views
from tessera.memory.domain.records import Turn
from tessera.memory.domain.views import NEIGHBOURS
from tessera.memory.ports import Indexable, IndexBatch, Stage, Vector
from tessera.storage import Database
from tessera.telemetry import metrics

CHANNEL = "tessera_memory_index"
"""Notified by Postgres whenever index work is added."""
INDEXED_BEFORE_COMMIT = "memory_indexed_before_commit"
"""Point at which a test may kill the process: everything is written, nothing is committed."""

_CLAIM = text("""
    SELECT tenant_id, id, memory_id, neighbours FROM index_task WHERE stage = :stage ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
""")
_TURNS = text("""
    SELECT m.tenant_id, m.id AS memory_id, 0 AS before, m.occurred_at, m.text, m.speaker, m.role, m.title
    FROM unnest(CAST(:tenants AS text[]), CAST(:ids AS uuid[])) AS wanted (tenant_id, id)
    JOIN memory m ON m.tenant_id = wanted.tenant_id AND m.id = wanted.id
    WHERE m.state = 'active' AND m.text IS NOT NULL
    UNION ALL
    SELECT m.tenant_id, m.id, earlier.before, earlier.occurred_at, earlier.text, earlier.speaker, earlier.role, earlier.title
    FROM unnest(CAST(:tenants AS text[]), CAST(:ids AS uuid[])) AS wanted (tenant_id, id)
    JOIN memory m ON m.tenant_id = wanted.tenant_id AND m.id = wanted.id AND m.series IS NOT NULL
    CROSS JOIN LATERAL (
        SELECT row_number() OVER (ORDER BY n.occurred_at DESC, n.ordinal DESC, n.id DESC) AS before,
            n.occurred_at, n.text, n.speaker, n.role, n.title
        FROM memory n
        WHERE n.tenant_id = m.tenant_id AND n.series = m.series AND n.state = 'active' AND n.text IS NOT NULL
            AND (n.occurred_at, n.ordinal, n.id) < (m.occurred_at, m.ordinal, m.id)
        ORDER BY n.occurred_at DESC, n.ordinal DESC, n.id DESC LIMIT :neighbours
    ) AS earlier
    ORDER BY tenant_id, memory_id, before DESC
""")
# What came next holds this memory in its context. Whoever waits for its own turn anyway, in this batch or later, is not asked twice.
_REINDEX_AFTER = text("""
    INSERT INTO index_task (tenant_id, memory_id, stage, neighbours)
    SELECT DISTINCT m.tenant_id, later.id, :stage, false
    FROM unnest(CAST(:tenants AS text[]), CAST(:ids AS uuid[])) AS wanted (tenant_id, id)
    JOIN memory m ON m.tenant_id = wanted.tenant_id AND m.id = wanted.id AND m.series IS NOT NULL
    CROSS JOIN LATERAL (
        SELECT n.id FROM memory n
        WHERE n.tenant_id = m.tenant_id AND n.series = m.series AND n.state = 'active'
            AND (n.occurred_at, n.ordinal, n.id) > (m.occurred_at, m.ordinal, m.id)
        ORDER BY n.occurred_at, n.ordinal, n.id LIMIT :neighbours
    ) AS later
    WHERE NOT EXISTS (SELECT FROM index_task t WHERE t.tenant_id = m.tenant_id AND t.memory_id = later.id AND t.stage = :stage)
""")
_DONE = text("""
    DELETE FROM index_task t USING unnest(CAST(:tenants AS text[]), CAST(:ids AS bigint[])) AS done (tenant_id, id)
    WHERE t.tenant_id = done.tenant_id AND t.id = done.id
""")
_PUT_VECTOR = text("""
    INSERT INTO memory_vec (tenant_id, model_id, id, alone, context)
    VALUES (:tenant, :model, :id, CAST(:alone AS halfvec), CAST(:context AS halfvec))
    ON CONFLICT (tenant_id, model_id, id) DO UPDATE SET alone = excluded.alone, context = excluded.context
""")


class PostgresIndexQueue:
    """`IndexQueue` on this service's Postgres, in the worker's role."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def claim(self, stage: Stage, limit: int) -> AsyncIterator[IndexBatch]:
        """See IndexQueue. The rows stay locked while the block runs, so a batch must be done well within the transaction time-out."""
        async with self._database.transaction() as connection:
            tasks = list(await connection.execute(_CLAIM, {"stage": stage, "limit": limit}))
            items = await _items(connection, [(task.tenant_id, task.memory_id) for task in tasks])
            yield PostgresIndexBatch(connection, items, len(tasks))
            if not tasks:
                return
            fresh = [task for task in tasks if task.neighbours]
            await connection.execute(_REINDEX_AFTER, {**_keys(fresh, "memory_id"), "stage": stage, "neighbours": NEIGHBOURS})
            await connection.execute(_DONE, _keys(tasks, "id"))
            faults.reach(INDEXED_BEFORE_COMMIT)
        metrics.MEMORIES_INDEXED.labels(stage=stage).inc(len(tasks))


class PostgresIndexBatch:
    """`IndexBatch` within one transaction."""

    def __init__(self, connection: AsyncConnection, items: Sequence[Indexable], claimed: int) -> None:
        self._connection = connection
        self.items = items
        self.claimed = claimed

    async def write_terms(self, counts: Sequence[tuple[Counter[int], Counter[int]]]) -> None:
        """See IndexBatch."""
        by_tenant: defaultdict[str, list[lexical.Entry]] = defaultdict(list)
        for item, (alone, context) in zip(self.items, counts, strict=True):
            by_tenant[item.tenant_id].append(lexical.Entry(item.memory_id, alone, context))
        for tenant_id, entries in sorted(by_tenant.items()):
            await lexical.put(self._connection, tenant_id, entries)

    async def write_vectors(self, vectors: Sequence[tuple[Vector, Vector]], model_id: str) -> None:
        """See IndexBatch."""
        rows = [
            {
                "tenant": item.tenant_id,
                "model": model_id,
                "id": item.memory_id,
                "alone": vector_text(alone),
                "context": vector_text(context),
            }
            for item, (alone, context) in zip(self.items, vectors, strict=True)
        ]
        if rows:
            await self._connection.execute(_PUT_VECTOR, rows)


async def _items(connection: AsyncConnection, wanted: Sequence[tuple[str, UUID]]) -> list[Indexable]:
    unique = sorted(set(wanted))
    if not unique:
        return []
    values = {"tenants": [tenant for tenant, _ in unique], "ids": [memory_id for _, memory_id in unique], "neighbours": NEIGHBOURS}
    turns: defaultdict[tuple[str, UUID], list[Turn]] = defaultdict(list)
    present: set[tuple[str, UUID]] = set()
    for row in (await connection.execute(_TURNS, values)).mappings():
        key = (row["tenant_id"], row["memory_id"])
        turns[key].append(turn_of(row))
        if row["before"] == 0:
            present.add(key)
    return [_indexable(key, turns[key]) for key in unique if key in present]


def _indexable(key: tuple[str, UUID], turns: Sequence[Turn]) -> Indexable:
    """`turns` ends with the memory itself."""
    return Indexable(*key, alone=views.alone(turns[-1]), context=views.context(turns[-1], turns[:-1]))


def _keys(tasks: Sequence[object], column: str) -> dict[str, list[object]]:
    return {"tenants": [getattr(task, "tenant_id") for task in tasks], "ids": [getattr(task, column) for task in tasks]}  # noqa: B009
