"""One function per event. The bus commits; a handler gets a unit of work or an emitter and never sees an adapter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from tessera.bus import Emitter, Received
from tessera.bus.waiting import WaitingRoom
from tessera.contracts.base import EventData
from tessera.contracts.errors import InvalidError
from tessera.contracts.events import (
    ArchiveRequested,
    DocumentPublished,
    EmbeddingCompleted,
    EmbeddingRequested,
    EntityPublished,
    Freshness,
    FreshnessInspected,
    FreshnessReported,
    GenerationReady,
    GenerationTokenized,
    IngestionInspected,
    IngestionReported,
    MemoryChanged,
    MessagePublished,
    ReadConsistency,
    RecallCompleted,
    RecalledMemory,
    RecallFilter,
    RecallRequested,
    RelationPublished,
)
from tessera.contracts.ids import aggregate_key
from tessera.contracts.sealing import opened
from tessera.memory.domain import admission, grounding
from tessera.memory.domain.admission import Provenance
from tessera.memory.domain.fusion import Ranked, fused
from tessera.memory.domain.records import Memory
from tessera.memory.domain.terms import terms
from tessera.memory.handlers.reading import EVENTUAL, Readers, not_fresh
from tessera.memory.ports import (
    AdmissionUnit,
    Archived,
    ArchiveUnit,
    Embedder,
    IngestionState,
    LogEnds,
    MemoryStore,
    QueryEmbedder,
    Question,
    Snapshot,
    Tenants,
)
from tessera.telemetry import metrics

EMBEDDER = "embedder"
_LONG_DOCUMENT_CHARACTERS = 5_000
"""From here on splitting takes longer than the event loop may be held."""


@dataclass(frozen=True, slots=True)
class Recollection:
    """What a search found, best first, and which dependencies were missing."""

    memories: tuple[RecalledMemory, ...]
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Handlers:
    """What the handlers work with, built once by the app."""

    tenants: Tenants
    store: MemoryStore
    embedder: Embedder
    queries: QueryEmbedder
    log_ends: LogEnds
    room: WaitingRoom = field(default_factory=WaitingRoom)
    """Where questions wait for what they must hold."""

    async def message_published(self, event: Received[MessagePublished], unit: AdmissionUnit) -> None:
        """Admits a message. Raises InvalidError `tenant_unknown`, `tenant_suspended` or `sealed_content`, as all admissions do."""
        await self._admit_tenant(event.tenant_id, unit)
        await _record(unit, [admission.message(event.data, _provenance(event))])

    async def document_published(self, event: Received[DocumentPublished], unit: AdmissionUnit) -> None:
        """Admits a document as chunks, in place of what was known under the same document id."""
        await self._admit_tenant(event.tenant_id, unit)
        origin = _provenance(event)
        long = len(opened(event.data.content)) > _LONG_DOCUMENT_CHARACTERS
        memories = await asyncio.to_thread(admission.document, event.data, origin) if long else admission.document(event.data, origin)
        if await _record(unit, memories):
            await _supersede(unit, origin, document_id=event.data.document_id)

    async def entity_published(self, event: Received[EntityPublished], unit: AdmissionUnit) -> None:
        """Admits an entity in place of what was known under the same entity id."""
        await self._admit_tenant(event.tenant_id, unit)
        origin = _provenance(event)
        entity, memory = admission.entity(event.data, origin)
        if await _record(unit, [memory], **admission.entity_details(event.data)):
            await unit.put_entity(entity)
            await _supersede(unit, origin, entity_id=entity.entity_id)

    async def relation_published(self, event: Received[RelationPublished], unit: AdmissionUnit) -> None:
        """Admits an edge between two entities, known or not."""
        await self._admit_tenant(event.tenant_id, unit)
        relation, memory = admission.relation(event.data, _provenance(event))
        if await _record(unit, [memory], **admission.relation_details(event.data)):
            await unit.put_relation(relation)

    async def _admit_tenant(self, tenant_id: str, unit: AdmissionUnit) -> None:
        state = await unit.tenant_state(tenant_id)
        if state is None:
            # A tenant may have been declared a moment ago: its declaration is on another topic, without an order between the two.
            await self.tenants.caught_up()
            state = await unit.tenant_state(tenant_id)
        if state is None:
            raise InvalidError("tenant_unknown", f"There is no tenant {tenant_id!r}.", "tenantid")
        if state != "active":
            raise InvalidError("tenant_suspended", f"The tenant {tenant_id!r} is suspended.", "tenantid")

    async def archive_requested(self, event: Received[ArchiveRequested], unit: ArchiveUnit) -> None:
        """Archives each memory at the version named, and says of each what became of it."""
        items = [(_memory_id(item.memory_id), item.version) for item in event.data.items]
        outcomes = await unit.archive(event.tenant_id, items, f"sweep {event.data.sweep_id}")
        await _tell_changes(unit, event.tenant_id, outcomes, sweep_id=event.data.sweep_id)

    async def recall_requested(self, event: Received[RecallRequested], emit: Emitter) -> None:
        """Answers a search, once it holds what was asked for; else says how far memory is."""
        question = await self._question(event.tenant_id, opened(event.data.query), event.data.limit, event.data.filter)

        async def answer(snapshot: Snapshot, freshness: Freshness) -> RecallCompleted:
            found = await self._found(snapshot, question)
            return RecallCompleted(memories=found.memories, degraded=found.degraded, freshness=freshness)

        wanted = event.data.consistency or EVENTUAL
        await self._readers.reply(event, wanted, emit, answer, lambda freshness: RecallCompleted(memories=(), freshness=freshness))

    async def freshness_inspected(self, event: Received[FreshnessInspected], emit: Emitter) -> None:
        """Answers when memory is as fresh as asked, or when it is known that it will not be in time."""

        async def answer(_: Snapshot, freshness: Freshness) -> FreshnessReported:
            return FreshnessReported(freshness=freshness)

        await self._readers.reply(event, event.data.consistency, emit, answer, lambda freshness: FreshnessReported(freshness=freshness))

    async def generation_tokenized(self, event: Received[GenerationTokenized], emit: Emitter) -> None:
        """Passes a generation on to the generator, with the memories it asked for.

        Whoever asks for fresh ones has waited before: here is only proved that they are. Fails the generation where they are not.
        """
        request, prompt = event.data.request, event.data.prompt
        ready = GenerationReady(request=request, prompt=prompt)
        query = grounding.question(request)
        if request.memory is not None and query.strip():
            wanted = request.memory
            question = await self._question(event.tenant_id, query, wanted.limit, RecallFilter(conversation_id=wanted.conversation_id))
            found = await self._found_if_fresh(event.tenant_id, wanted.consistency, question)
            if isinstance(found, Freshness):
                await emit.fail(not_fresh(found))
                return
            memories = await asyncio.to_thread(grounding.fitting, found.memories, request.model.encoding, wanted.token_budget)
            state = "degraded" if found.degraded else "complete"
            ready = GenerationReady(request=request, prompt=prompt, recall=state, memories=tuple(memories))
        await emit.publish(ready, step="recall", key=request.generation_id.encode())

    async def embedding_requested(self, event: Received[EmbeddingRequested], emit: Emitter) -> None:
        """Answers with vectors. Raises InvalidError `model_not_found` for a model that is not served here."""
        if event.data.model != self.embedder.model_id:
            raise InvalidError("model_not_found", f"There is no embedding model {event.data.model!r}.", "model")
        embedded = await self.embedder.embed(event.data.inputs)
        vectors, counts = tuple(one.vector for one in embedded), tuple(one.tokens for one in embedded)
        await emit.reply(EmbeddingCompleted(model=event.data.model, vectors=vectors, token_counts=counts))

    async def ingestion_inspected(self, event: Received[IngestionInspected], emit: Emitter) -> None:
        """Answers where an ingested event stands."""
        async with self.store.snapshot(event.tenant_id) as snapshot:
            found = await snapshot.ingestion(event.data.event_id)
        await emit.reply(
            IngestionReported(
                event_id=event.data.event_id, state=_state(found), memory_ids=found.memory_ids, reason=found.refusal, writes=found.writes
            )
        )

    async def recall(self, tenant_id: str, query: str, limit: int, wanted: RecallFilter) -> Recollection:
        """Searches one tenant's memory. Without the embedder the answer is lexical and says so."""
        question = await self._question(tenant_id, query, limit, wanted)
        async with self.store.snapshot(tenant_id) as snapshot:
            return await self._found(snapshot, question)

    @property
    def _readers(self) -> Readers:
        return Readers(self.store, self.log_ends, self.room)

    async def _question(self, tenant_id: str, query: str, limit: int, wanted: RecallFilter) -> Question:
        started = time.perf_counter()
        vector = await self.queries.vector(tenant_id, query)
        return Question(vector, self.embedder.model_id, dict(terms(query)), wanted, limit, time.perf_counter() - started)

    async def _found(self, snapshot: Snapshot, question: Question) -> Recollection:
        started, vectors = time.perf_counter(), question.vector is not None
        found = await snapshot.find(question)
        ranked = fused(found.candidates, found.extent, vectors=vectors, now=datetime.now(UTC), limit=question.limit)
        memories = await snapshot.memories([one.key for one in ranked])
        recalled = tuple(_recalled(memories[one.key], one) for one in ranked if one.key in memories)
        metrics.RECALL_SECONDS.observe(question.embedding_seconds + time.perf_counter() - started)
        metrics.RECALLS.labels(state="complete" if vectors else "degraded").inc()
        return Recollection(recalled, () if vectors else (EMBEDDER,))

    async def _found_if_fresh(self, tenant_id: str, wanted: ReadConsistency | None, question: Question) -> Recollection | Freshness:
        """The memories; how fresh they are instead where that is less than wanted. Does not wait."""
        if wanted is None:
            async with self.store.snapshot(tenant_id) as snapshot:
                return await self._found(snapshot, question)
        reading = await self._readers.reading(tenant_id, wanted)
        freshness, found = await self._readers.look(tenant_id, reading, lambda snapshot, _: self._found(snapshot, question))
        return found or freshness


def _state(found: IngestionState) -> Literal["unknown", "applied", "searchable", "refused"]:
    if found.memory_ids:
        return "applied" if found.pending else "searchable"
    return "refused" if found.refusal else "unknown"


def _memory_id(value: str) -> UUID:
    try:
        return UUID(value)
    except ValueError:
        raise InvalidError("memory_id_invalid", "A memory's id is a UUID.", "items.memory_id") from None


def _provenance(event: Received[Any]) -> Provenance:
    return Provenance(
        tenant_id=event.tenant_id,
        source=event.source,
        id=event.id,
        digest=event.digest,
        time=event.time,
        recorded_at=datetime.now(UTC),
        subject_id=event.subject_id,
        sequence=event.sequence,
    )


async def _record(unit: AdmissionUnit, memories: Sequence[Memory], **details: Any) -> list[Memory]:
    """Stores memories and puts them on the log of record; gives back those that were new."""
    added = await unit.add(memories)
    for index, memory in enumerate(added):
        metrics.MEMORIES_RECORDED.labels(kind=memory.kind).inc()
        key = admission.ordering_key(memory, details.get("source_entity_id"))
        data: EventData = admission.recorded(memory, **details)
        await unit.publish(data, step="recorded", index=index, key=key, subject_id=memory.subject_id)
    return added


async def _supersede(unit: AdmissionUnit, origin: Provenance, *, document_id: str | None = None, entity_id: str | None = None) -> None:
    outcomes = await unit.supersede(origin.tenant_id, document_id=document_id, entity_id=entity_id, keep=origin.digest)
    await _tell_changes(unit, origin.tenant_id, outcomes)


async def _tell_changes(
    unit: AdmissionUnit | ArchiveUnit, tenant_id: str, outcomes: Sequence[Archived], sweep_id: str | None = None
) -> None:
    now = datetime.now(UTC)
    for index, outcome in enumerate(outcomes):
        changed = MemoryChanged(
            memory_id=outcome.memory_id,
            version=outcome.version,
            change="archive_skipped" if outcome.skipped else "archived",
            reason=outcome.skipped or (None if sweep_id else "superseded"),
            sweep_id=sweep_id,
            changed_at=now,
        )
        await unit.publish(changed, step="changed", index=index, key=aggregate_key(tenant_id, "memory", outcome.memory_id))


def _recalled(memory: Memory, ranked: Ranked[UUID]) -> RecalledMemory:
    return RecalledMemory(
        memory_id=str(memory.id),
        kind=memory.kind,
        text=memory.text or "",
        scores=ranked.scores,
        occurred_at=memory.occurred_at,
        importance=memory.importance,
        origin_id=memory.origin_id,
        conversation_id=memory.conversation_id,
        role=memory.role,
        speaker=memory.speaker,
        document_id=memory.document_id,
        title=memory.title,
        chunk_index=memory.chunk_index,
        entity_id=memory.entity_id,
        metadata=dict(memory.metadata),
    )
