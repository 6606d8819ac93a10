"""The lexical index and its statistics: written together, so that they never disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.memory.domain.bm25 import TermStatistics, document_weights
from tessera.memory.domain.records import View
from tessera.memory.domain.terms import sparse_text

_REMOVE = text("""
    DELETE FROM memory_lex WHERE tenant_id = :tenant AND id = ANY(CAST(:ids AS uuid[])) RETURNING CAST(alone AS text), CAST(context AS text)
""")
_INSERT = text("""
    INSERT INTO memory_lex (tenant_id, id, alone, context)
    SELECT :tenant, id, CAST(alone AS sparsevec), CAST(context AS sparsevec)
    FROM unnest(CAST(:ids AS uuid[]), CAST(:alone AS text[]), CAST(:context AS text[])) AS entry (id, alone, context)
""")
# In the order of the terms, so that two writers never wait for each other in a circle.
_COUNT_TERMS = text("""
    INSERT INTO lexical_term AS known (tenant_id, term, alone, context)
    SELECT :tenant, term, alone, context
    FROM unnest(CAST(:terms AS integer[]), CAST(:alone AS bigint[]), CAST(:context AS bigint[])) AS change (term, alone, context)
    ORDER BY term
    ON CONFLICT (tenant_id, term) DO UPDATE SET alone = known.alone + excluded.alone, context = known.context + excluded.context
""")
_COUNT_MEMORIES = text("""
    INSERT INTO lexical_size AS known (tenant_id, memories) VALUES (:tenant, :change)
    ON CONFLICT (tenant_id) DO UPDATE SET memories = known.memories + excluded.memories
""")
_LOCK_SIZE = text("SELECT memories FROM lexical_size WHERE tenant_id = :tenant FOR UPDATE")
_SIZE = text("SELECT memories FROM lexical_size WHERE tenant_id = :tenant")
_TERMS = text("SELECT term, alone, context FROM lexical_term WHERE tenant_id = :tenant AND term = ANY(CAST(:terms AS integer[]))")


@dataclass(frozen=True, slots=True)
class Entry:
    """The terms of one memory in both views."""

    memory_id: UUID
    alone: Counter[int]
    context: Counter[int]


async def put(connection: AsyncConnection, tenant_id: str, entries: Sequence[Entry]) -> None:
    """Writes or replaces the entries of one tenant's memories."""
    changes, removed = await _taken_out(connection, tenant_id, [entry.memory_id for entry in entries])
    for entry in entries:
        changes["alone"].update(entry.alone.keys())
        changes["context"].update(entry.context.keys())
    values = {
        "ids": [entry.memory_id for entry in entries],
        "alone": [sparse_text(document_weights(entry.alone, "alone")) for entry in entries],
        "context": [sparse_text(document_weights(entry.context, "context")) for entry in entries],
    }
    await connection.execute(_INSERT, {"tenant": tenant_id, **values})
    await _count(connection, tenant_id, changes, len(entries) - removed)


async def remove(connection: AsyncConnection, tenant_id: str, ids: Sequence[UUID]) -> None:
    """Takes the memories out of the index, those that are in it."""
    changes, removed = await _taken_out(connection, tenant_id, ids)
    if removed:
        await _count(connection, tenant_id, changes, -removed)


async def statistics(connection: AsyncConnection, tenant_id: str, terms: Iterable[int]) -> Mapping[View, TermStatistics]:
    """What BM25 needs to know of these terms, per view."""
    memories = await connection.scalar(_SIZE, {"tenant": tenant_id}) or 0
    rows = list(await connection.execute(_TERMS, {"tenant": tenant_id, "terms": sorted(terms)}))
    return {
        "alone": TermStatistics(memories, {row.term: row.alone for row in rows}),
        "context": TermStatistics(memories, {row.term: row.context for row in rows}),
    }


async def _taken_out(connection: AsyncConnection, tenant_id: str, ids: Sequence[UUID]) -> tuple[dict[View, Counter[int]], int]:
    """Deletes the entries; gives back the changes to the counts (negative) and how many entries there were."""
    await connection.execute(_LOCK_SIZE, {"tenant": tenant_id})
    changes: dict[View, Counter[int]] = {"alone": Counter(), "context": Counter()}
    rows = list(await connection.execute(_REMOVE, {"tenant": tenant_id, "ids": list(ids)}))
    for row in rows:
        changes["alone"].subtract(_terms_in(row[0]))
        changes["context"].subtract(_terms_in(row[1]))
    return changes, len(rows)


async def _count(connection: AsyncConnection, tenant_id: str, changes: Mapping[View, Counter[int]], memories: int) -> None:
    terms = sorted(
        term for term in changes["alone"].keys() | changes["context"].keys() if changes["alone"][term] or changes["context"][term]
    )
    values = {view: [counts[term] for term in terms] for view, counts in changes.items()}
    if terms:
        await connection.execute(
            _COUNT_TERMS, {"tenant": tenant_id, "terms": terms, "alone": values["alone"], "context": values["context"]}
        )
    if memories:
        await connection.execute(_COUNT_MEMORIES, {"tenant": tenant_id, "change": memories})


def _terms_in(sparse: str) -> list[int]:
    inside = sparse[1 : sparse.index("}")]
    return [int(pair.split(":", 1)[0]) for pair in inside.split(",")] if inside else []
