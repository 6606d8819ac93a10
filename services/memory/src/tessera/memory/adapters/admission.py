"""Storing what was admitted, and archiving, inside the bus's transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from tessera.bus import Transaction
from tessera.contracts.base import EventData
from tessera.memory.adapters import lexical
from tessera.memory.adapters.sql import MEMORY_COLUMNS, memory_row
from tessera.memory.domain.mentions import mentions, names_of, phrases
from tessera.memory.domain.records import Entity, Memory, Relation
from tessera.memory.domain.views import NEIGHBOURS
from tessera.memory.ports import Archived, TenantState

_COLUMNS = f"{MEMORY_COLUMNS}, series"
_INSERT_MEMORY = text(
    # The names are this module's own constants.
    f"INSERT INTO memory ({_COLUMNS}) VALUES ({', '.join(':' + name for name in _COLUMNS.split(', '))})".replace(  # noqa: S608
        ":metadata", "CAST(:metadata AS jsonb)"
    )
    + " ON CONFLICT (tenant_id, id) DO NOTHING RETURNING id"
)
_INSERT_TASKS = text("""
    INSERT INTO index_task (tenant_id, memory_id, stage)
    SELECT :tenant, wanted.id, stage.name FROM unnest(CAST(:ids AS uuid[])) WITH ORDINALITY AS wanted (id, place),
        (VALUES ('lexical'), ('vector')) AS stage (name) ORDER BY wanted.place
""")
_INSERT_MENTIONS_OF_NAMES = text("""
    INSERT INTO mention (tenant_id, memory_id, entity_id)
    SELECT DISTINCT CAST(:tenant AS text), CAST(:memory AS uuid), entity_id FROM entity_name
    WHERE tenant_id = :tenant AND name = ANY(CAST(:names AS text[]))
    ON CONFLICT DO NOTHING
""")
_UPSERT_ENTITY = text("""
    INSERT INTO entity (tenant_id, entity_id, subject_id, name, kind, aliases, description, memory_id)
    VALUES (:tenant_id, :entity_id, :subject_id, :name, :kind, :aliases, :description, :memory_id)
    ON CONFLICT (tenant_id, entity_id) DO UPDATE SET subject_id = excluded.subject_id, name = excluded.name, kind = excluded.kind,
        aliases = excluded.aliases, description = excluded.description, memory_id = excluded.memory_id
""")
_FORGET_NAMES = text("DELETE FROM entity_name WHERE tenant_id = :tenant AND entity_id = :entity")
_FORGET_MENTIONS = text("DELETE FROM mention WHERE tenant_id = :tenant AND entity_id = :entity")
_INSERT_NAMES = text("""
    INSERT INTO entity_name (tenant_id, name, entity_id) SELECT :tenant, name, :entity FROM unnest(CAST(:names AS text[])) AS name
    ON CONFLICT DO NOTHING
""")
_TEXTS_WITH = text("""
    SELECT id, text FROM memory
    WHERE tenant_id = :tenant AND state = 'active' AND text IS NOT NULL
        AND EXISTS (SELECT FROM unnest(CAST(:needles AS text[])) AS needle WHERE strpos(lower(memory.text), needle) > 0)
""")
_INSERT_MENTIONS_IN = text("""
    INSERT INTO mention (tenant_id, memory_id, entity_id) SELECT :tenant, id, :entity FROM unnest(CAST(:ids AS uuid[])) AS id
    ON CONFLICT DO NOTHING
""")
_INSERT_RELATION = text("""
    INSERT INTO relation (tenant_id, source_entity_id, relation, target_entity_id, memory_id, subject_id, weight, valid_from, valid_to)
    VALUES (:tenant_id, :source_entity_id, :relation, :target_entity_id, :memory_id, :subject_id, :weight, :valid_from, :valid_to)
    ON CONFLICT DO NOTHING
""")
_SUPERSEDED = text("""
    SELECT id, version FROM memory
    WHERE tenant_id = :tenant AND state = 'active' AND origin_digest <> :keep
        AND ((kind = 'chunk' AND series = 'document:' || CAST(:document AS text))
            OR (kind = 'entity' AND entity_id = CAST(:entity AS text)))
    ORDER BY occurred_at, ordinal, id
""")
_LOCKED = text("SELECT id, version, state FROM memory WHERE tenant_id = :tenant AND id = ANY(CAST(:ids AS uuid[])) ORDER BY id FOR UPDATE")
_ARCHIVE = text("""
    UPDATE memory SET state = 'archived', version = version + 1, archived_at = :now, archive_reason = :reason
    WHERE tenant_id = :tenant AND id = ANY(CAST(:ids AS uuid[]))
""")
# What came next holds the archived text in its context, so it is indexed anew without it.
_REINDEX_AFTER = text("""
    INSERT INTO index_task (tenant_id, memory_id, stage, neighbours)
    SELECT DISTINCT m.tenant_id, later.id, stage.name, false FROM memory m
    CROSS JOIN LATERAL (
        SELECT n.id FROM memory n
        WHERE n.tenant_id = m.tenant_id AND n.series = m.series AND n.state = 'active'
            AND (n.occurred_at, n.ordinal, n.id) > (m.occurred_at, m.ordinal, m.id)
        ORDER BY n.occurred_at, n.ordinal, n.id LIMIT :neighbours
    ) AS later
    CROSS JOIN (VALUES ('lexical'), ('vector')) AS stage (name)
    WHERE m.tenant_id = :tenant AND m.id = ANY(CAST(:ids AS uuid[])) AND m.series IS NOT NULL
""")
_FORGET_TASKS = text("DELETE FROM index_task WHERE tenant_id = :tenant AND memory_id = ANY(CAST(:ids AS uuid[]))")
_FORGET_VECTORS = text("DELETE FROM memory_vec WHERE tenant_id = :tenant AND id = ANY(CAST(:ids AS uuid[]))")
_LONG_TEXT_CHARACTERS: Final = 2_000
"""From here on finding all phrases takes longer than the event loop may be held."""


class PostgresUnit:
    """`AdmissionUnit` and `ArchiveUnit` on the transaction that the bus opened and will commit."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection

    async def tenant_state(self, tenant_id: str) -> TenantState | None:
        """See AdmissionUnit."""
        state: TenantState | None = await self._connection.scalar(
            text("SELECT state FROM tenant WHERE tenant_id = :tenant"), {"tenant": tenant_id}
        )
        return state

    async def add(self, memories: Sequence[Memory]) -> list[Memory]:
        """See AdmissionUnit."""
        added = [memory for memory in memories if await self._connection.scalar(_INSERT_MEMORY, memory_row(memory)) is not None]
        searched = [memory for memory in added if memory.text is not None]
        if searched:
            await self._execute(_INSERT_TASKS, tenant=searched[0].tenant_id, ids=[memory.id for memory in searched])
        for memory in searched:
            await self._note_mentions(memory)
        return added

    async def supersede(
        self, tenant_id: str, *, document_id: str | None = None, entity_id: str | None = None, keep: bytes
    ) -> list[Archived]:
        """See AdmissionUnit."""
        rows = await self._connection.execute(
            _SUPERSEDED, {"tenant": tenant_id, "document": document_id, "entity": entity_id, "keep": keep}
        )
        items = [(row.id, row.version) for row in rows]
        return await self.archive(tenant_id, items, "superseded") if items else []

    async def put_entity(self, entity: Entity) -> None:
        """See AdmissionUnit."""
        names = names_of(entity.name, entity.aliases)
        await self._execute(_UPSERT_ENTITY, **_row(entity, aliases=list(entity.aliases)))
        for forget in (_FORGET_NAMES, _FORGET_MENTIONS):
            await self._execute(forget, tenant=entity.tenant_id, entity=entity.entity_id)
        await self._execute(_INSERT_NAMES, tenant=entity.tenant_id, entity=entity.entity_id, names=sorted(names))
        await self._note_mentions_of(entity, names)

    async def put_relation(self, relation: Relation) -> None:
        """See AdmissionUnit."""
        await self._execute(_INSERT_RELATION, **_row(relation))

    async def archive(self, tenant_id: str, items: Sequence[tuple[UUID, int]], reason: str) -> list[Archived]:
        """See ArchiveUnit."""
        rows = await self._connection.execute(_LOCKED, {"tenant": tenant_id, "ids": [memory_id for memory_id, _ in items]})
        known = {row.id: (row.version, row.state) for row in rows}
        outcomes = [_outcome(memory_id, version, known.get(memory_id)) for memory_id, version in items]
        due = [UUID(outcome.memory_id) for outcome in outcomes if outcome.skipped is None]
        if due:
            await self._archive(tenant_id, due, reason)
        return outcomes

    async def publish(self, data: EventData, *, step: str, index: int = 0, key: bytes | None = None, subject_id: str | None = None) -> str:
        """See AdmissionUnit."""
        return await self._transaction.publish(data, step=step, index=index, key=key, subject_id=subject_id)

    async def _archive(self, tenant_id: str, ids: list[UUID], reason: str) -> None:
        await self._execute(_ARCHIVE, tenant=tenant_id, ids=ids, reason=reason, now=datetime.now(UTC))
        await lexical.remove(self._connection, tenant_id, ids)
        await self._execute(_FORGET_VECTORS, tenant=tenant_id, ids=ids)
        await self._execute(_FORGET_TASKS, tenant=tenant_id, ids=ids)
        await self._execute(_REINDEX_AFTER, tenant=tenant_id, ids=ids, neighbours=NEIGHBOURS)

    async def _note_mentions(self, memory: Memory) -> None:
        words = memory.text or ""
        names = sorted(await asyncio.to_thread(phrases, words) if len(words) > _LONG_TEXT_CHARACTERS else phrases(words))
        await self._execute(_INSERT_MENTIONS_OF_NAMES, tenant=memory.tenant_id, memory=memory.id, names=names)

    async def _note_mentions_of(self, entity: Entity, names: set[str]) -> None:
        needles = sorted({max(name.split(), key=len) for name in names})
        rows = await self._connection.execute(_TEXTS_WITH, {"tenant": entity.tenant_id, "needles": needles})
        naming = [row.id for row in rows if mentions(row.text, names)]
        if naming:
            await self._execute(_INSERT_MENTIONS_IN, tenant=entity.tenant_id, entity=entity.entity_id, ids=naming)

    async def _execute(self, statement: Any, **values: Any) -> None:
        await self._connection.execute(statement, values)


def _row(record: Entity | Relation, **changed: Any) -> dict[str, Any]:
    return {**{name: getattr(record, name) for name in record.__slots__}, **changed}


def _outcome(memory_id: UUID, wanted: int, known: tuple[int, str] | None) -> Archived:
    if known is None:
        return Archived(str(memory_id), wanted, "unknown")
    version, state = known
    if state == "archived":
        return Archived(str(memory_id), version, "already_archived")
    return Archived(str(memory_id), version + 1) if version == wanted else Archived(str(memory_id), version, "version_changed")
