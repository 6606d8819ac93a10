"""Reading one tenant's memory: the client role under row-level security, one snapshot per question."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

from sqlalchemy import RowMapping, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus.consistency import Seen, Target
from tessera.bus.freshness import seen_in
from tessera.contracts.catalogue import TrafficClass, consumer_group
from tessera.contracts.errors import Problem
from tessera.contracts.events import AwaitedWrite, RecallFilter, SearchStage
from tessera.memory.adapters import lexical
from tessera.memory.adapters.sql import MEMORY_COLUMNS, memory_of, vector_text
from tessera.memory.domain.bm25 import query_weights
from tessera.memory.domain.freshness import Indexing
from tessera.memory.domain.fusion import Bounds, Candidate, Extent, Pair
from tessera.memory.domain.records import Memory
from tessera.memory.domain.terms import sparse_text
from tessera.memory.ports import Found, IngestionState, Question, Snapshot, ingestion_topics
from tessera.storage import Database

SMALLEST_POOL: Final = 100
"""Candidates that each view puts forward at least."""
POOL_PER_RESULT: Final = 4

# Exact: every row of the tenant is compared (0.5-5 ms for 1,000-10,000 rows), so recall never shrinks behind a filter as it does with an
# approximate index. `<#>` is the negative inner product; all vectors have unit length, so it is the negative cosine.
_SEARCH = """
WITH v AS MATERIALIZED (
    SELECT id, -(alone <#> CAST(:vector AS halfvec)) AS a, -(context <#> CAST(:vector AS halfvec)) AS c
    FROM memory_vec WHERE tenant_id = :tenant AND model_id = :model AND CAST(:vector AS text) IS NOT NULL /*filter*/
), l AS MATERIALIZED (
    SELECT id, -(alone <#> CAST(:terms_alone AS sparsevec)) AS a, -(context <#> CAST(:terms_context AS sparsevec)) AS c
    FROM memory_lex WHERE tenant_id = :tenant AND CAST(:terms_context AS text) NOT LIKE '{}%' /*filter*/
), chosen AS (
    (SELECT id FROM v ORDER BY a DESC, id LIMIT :pool) UNION (SELECT id FROM v ORDER BY c DESC, id LIMIT :pool)
    UNION (SELECT id FROM l WHERE a > 0 ORDER BY a DESC, id LIMIT :pool)
    UNION (SELECT id FROM l WHERE c > 0 ORDER BY c DESC, id LIMIT :pool)
), extent AS (
    SELECT (SELECT ARRAY[min(a), max(a), min(c), max(c)] FROM v) AS v, (SELECT ARRAY[0, max(a), 0, max(c)] FROM l) AS l
)
SELECT chosen.id, m.importance, m.occurred_at, v.a AS va, v.c AS vc, l.a AS la, l.c AS lc, extent.v AS v_extent, extent.l AS l_extent
FROM chosen JOIN memory m ON m.tenant_id = :tenant AND m.id = chosen.id AND m.state = 'active'
LEFT JOIN v ON v.id = chosen.id LEFT JOIN l ON l.id = chosen.id CROSS JOIN extent
ORDER BY m.occurred_at DESC, chosen.id
"""
_FILTER = """ AND id IN (
        SELECT id FROM memory WHERE tenant_id = :tenant AND state = 'active'
            AND (CAST(:conversation AS text) IS NULL OR conversation_id = :conversation)
            AND (CAST(:document AS text) IS NULL OR document_id = :document)
            AND (cardinality(CAST(:kinds AS text[])) = 0 OR kind = ANY(CAST(:kinds AS text[])))
    )"""
_SEARCH_ALL: Final = text(_SEARCH.replace("/*filter*/", ""))
_SEARCH_FILTERED: Final = text(_SEARCH.replace("/*filter*/", _FILTER))
_MEMORIES: Final = text(
    # The columns are a constant.
    f"SELECT {MEMORY_COLUMNS} FROM memory WHERE tenant_id = :tenant AND state = 'active' AND id = ANY(CAST(:ids AS uuid[]))"  # noqa: S608
)
_INGESTED: Final = text("""
    SELECT m.id, EXISTS (SELECT FROM index_task t WHERE t.tenant_id = m.tenant_id AND t.memory_id = m.id) AS pending
    FROM memory m WHERE m.tenant_id = :tenant AND m.origin_id = :event ORDER BY m.ordinal, m.id
""")
_REFUSED: Final = text(
    "SELECT code, message, field FROM refusal WHERE tenant_id = :tenant AND event_id = :event ORDER BY refused_at DESC LIMIT 1"
)
_APPLIED: Final = text("""
    SELECT DISTINCT i.identity, i.body FROM memory m
    JOIN inbox i ON i.tenant_id = m.tenant_id AND i.identity = m.origin_digest AND i.consumer = :consumer AND i.generation = 1
    WHERE m.tenant_id = :tenant AND m.origin_id = :event
""")
# Only the work of new memories counts: one that is indexed anew, because its neighbours changed, can be found meanwhile.
_INDEXING: Final = text("""
    SELECT stage.name,
        (SELECT min(id) FROM index_task t WHERE t.tenant_id = :tenant AND t.stage = stage.name AND t.neighbours) AS oldest,
        (SELECT max(id) FROM index_task t WHERE t.tenant_id = :tenant AND t.stage = stage.name AND t.neighbours) AS newest
    FROM (VALUES ('lexical'), ('vector')) AS stage (name)
""")
_AWAITED: Final = text("""
    SELECT DISTINCT t.stage FROM memory m JOIN index_task t ON t.tenant_id = m.tenant_id AND t.memory_id = m.id AND t.neighbours
    WHERE m.tenant_id = :tenant AND m.origin_digest = ANY(CAST(:identities AS bytea[]))
""")
_INGESTION: Final = consumer_group("memory", TrafficClass.INGESTION)
_STAGES: Final[dict[str, SearchStage]] = {"lexical": "words", "vector": "vectors"}


class PostgresMemoryStore:
    """`MemoryStore` on this service's Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def snapshot(self, tenant_id: str) -> AsyncIterator[Snapshot]:
        """See MemoryStore."""
        async with self._database.reading(tenant_id) as connection:
            yield PostgresSnapshot(connection, tenant_id)


class PostgresSnapshot:
    """`Snapshot` in one read-only transaction."""

    def __init__(self, connection: AsyncConnection, tenant_id: str) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    async def find(self, question: Question) -> Found:
        """See Snapshot."""
        statistics = await lexical.statistics(self._connection, self._tenant_id, question.terms)
        weights = {view: sparse_text(query_weights(question.terms, known)) for view, known in statistics.items()}
        values = {
            "tenant": self._tenant_id,
            "model": question.model_id,
            "vector": vector_text(question.vector) if question.vector is not None else None,
            "terms_alone": weights["alone"],
            "terms_context": weights["context"],
            "pool": max(SMALLEST_POOL, POOL_PER_RESULT * question.limit),
        }
        rows = (await self._connection.execute(_search(question.filter), {**values, **_filter_values(question.filter)})).mappings().all()
        return Found([_candidate(row) for row in rows], _extent(rows[0]) if rows else _EMPTY)

    async def memories(self, ids: Sequence[UUID]) -> dict[UUID, Memory]:
        """See Snapshot."""
        rows = await self._connection.execute(_MEMORIES, {"tenant": self._tenant_id, "ids": list(ids)})
        return {row["id"]: memory_of(row) for row in rows.mappings()}

    async def ingestion(self, event_id: str) -> IngestionState:
        """See Snapshot."""
        values = {"tenant": self._tenant_id, "event": event_id}
        rows = list(await self._connection.execute(_INGESTED, values))
        if rows:
            applied = await self._connection.execute(_APPLIED, {**values, "consumer": _INGESTION})
            writes = tuple(AwaitedWrite(identity=bytes(row.identity).hex(), body=bytes(row.body).hex()) for row in applied)
            return IngestionState(tuple(str(row.id) for row in rows), pending=any(row.pending for row in rows), writes=writes)
        refused = (await self._connection.execute(_REFUSED, values)).first()
        return IngestionState(refusal=Problem(code=refused.code, message=refused.message, param=refused.field) if refused else None)

    async def seen(self, target: Target) -> Seen:
        """See Snapshot."""
        return await seen_in(self._connection, _INGESTION, self._tenant_id, ingestion_topics(self._tenant_id), target)

    async def indexing(self, target: Target) -> Indexing:
        """See Snapshot."""
        left = [row for row in await self._connection.execute(_INDEXING, {"tenant": self._tenant_id}) if row.oldest is not None]
        oldest, newest = ({_STAGES[row.name]: getattr(row, which) for row in left} for which in ("oldest", "newest"))
        if not left or not target.writes:
            return Indexing(frozenset(), oldest, newest)
        identities = [write.identity for write in target.writes]
        awaited = await self._connection.execute(_AWAITED, {"tenant": self._tenant_id, "identities": identities})
        return Indexing(frozenset(_STAGES[row.stage] for row in awaited), oldest, newest)


_EMPTY: Final = Extent(Bounds(0, 0), Bounds(0, 0), Bounds(0, 0), Bounds(0, 0))


def _is_open(wanted: RecallFilter) -> bool:
    return wanted.conversation_id is None and wanted.document_id is None and not wanted.kinds


def _search(wanted: RecallFilter) -> TextClause:
    return _SEARCH_ALL if _is_open(wanted) else _SEARCH_FILTERED


def _filter_values(wanted: RecallFilter) -> dict[str, Any]:
    if _is_open(wanted):
        return {}
    return {"conversation": wanted.conversation_id, "document": wanted.document_id, "kinds": list(wanted.kinds)}


def _candidate(row: RowMapping) -> Candidate[UUID]:
    vector = Pair(row["va"], row["vc"]) if row["va"] is not None else None
    matched = row["la"] is not None and max(row["la"], row["lc"]) > 0
    lexical_pair = Pair(row["la"], row["lc"]) if matched else None
    return Candidate(row["id"], vector, lexical_pair, row["importance"], row["occurred_at"])


def _extent(row: RowMapping) -> Extent:
    bounds = [value or 0.0 for value in (*row["v_extent"], *row["l_extent"])]
    return Extent(*(Bounds(bounds[place], bounds[place + 1]) for place in range(0, 8, 2)))
