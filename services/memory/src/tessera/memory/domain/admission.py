"""What an ingested event becomes: records whose ids follow from the event's identity alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from tessera.contracts.events import DocumentPublished, EntityPublished, MemoryRecorded, MessagePublished, RelationPublished
from tessera.contracts.ids import aggregate_key, derived_id
from tessera.contracts.sealing import opened
from tessera.memory.domain.chunking import chunks
from tessera.memory.domain.importance import importance
from tessera.memory.domain.records import Entity, Memory, Relation


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where and when an event came from."""

    tenant_id: str
    source: str
    id: str
    digest: bytes
    time: datetime
    recorded_at: datetime
    subject_id: str | None = None
    sequence: int | None = None

    def memory_id(self, index: int = 0) -> UUID:
        """The id of the `index`-th memory of this event: the same on every repeat, another for another tenant or source."""
        return derived_id(self.id, f"memory/{self.tenant_id}/{self.source}", index)

    def common(self) -> dict[str, Any]:
        """The fields that every memory of this event shares."""
        return {
            "tenant_id": self.tenant_id,
            "origin_id": self.id,
            "origin_digest": self.digest,
            "recorded_at": self.recorded_at,
            "subject_id": self.subject_id,
        }


def message(data: MessagePublished, origin: Provenance) -> Memory:
    """A message is one memory. Raises InvalidError `sealed_content`."""
    return Memory(
        **origin.common(),
        id=origin.memory_id(),
        kind="message",
        occurred_at=data.occurred_at or origin.time,
        importance=importance("message", data.role, data.importance),
        text=opened(data.content),
        conversation_id=data.conversation_id,
        role=data.role,
        speaker=data.speaker,
        ordinal=origin.sequence or 0,
        metadata=data.metadata,
    )


def document(data: DocumentPublished, origin: Provenance) -> list[Memory]:
    """A document is a memory per chunk, in order; CPU work that grows with its length. Raises InvalidError `sealed_content`."""
    pieces = chunks(opened(data.content))
    return [
        Memory(
            **origin.common(),
            id=origin.memory_id(index),
            kind="chunk",
            occurred_at=data.occurred_at or origin.time,
            importance=importance("chunk", explicit=data.importance),
            text=piece.text,
            document_id=data.document_id,
            title=data.title,
            chunk_index=index,
            chunk_count=len(pieces),
            start=piece.start,
            end=piece.end,
            ordinal=index,
            metadata=data.metadata,
        )
        for index, piece in enumerate(pieces)
    ]


def entity(data: EntityPublished, origin: Provenance) -> tuple[Entity, Memory]:
    """An entity, and the memory by which it is found."""
    memory_id = origin.memory_id()
    kept = Entity(
        tenant_id=origin.tenant_id,
        entity_id=data.entity_id,
        name=data.name,
        kind=data.kind,
        aliases=data.aliases,
        description=data.description,
        memory_id=memory_id,
        subject_id=origin.subject_id,
    )
    found = Memory(
        **origin.common(),
        id=memory_id,
        kind="entity",
        occurred_at=origin.time,
        importance=importance("entity"),
        text=described(data),
        entity_id=data.entity_id,
        metadata=data.metadata,
    )
    return kept, found


def described(data: EntityPublished) -> str:
    """`Ada (person), also called Countess of Lovelace: description`."""
    called = f", also called {', '.join(data.aliases)}" if data.aliases else ""
    return f"{data.name} ({data.kind}){called}" + (f": {data.description}" if data.description else "")


def relation(data: RelationPublished, origin: Provenance) -> tuple[Relation, Memory]:
    """An edge, and the memory that records it; a relation has no text and is not searched."""
    memory_id = origin.memory_id()
    kept = Relation(
        tenant_id=origin.tenant_id,
        source_entity_id=data.source_entity_id,
        relation=data.relation,
        target_entity_id=data.target_entity_id,
        weight=data.weight,
        valid_from=data.valid_from,
        valid_to=data.valid_to,
        memory_id=memory_id,
        subject_id=origin.subject_id,
    )
    recorded = Memory(
        **origin.common(),
        id=memory_id,
        kind="relation",
        occurred_at=data.valid_from or origin.time,
        importance=importance("relation"),
        metadata=data.metadata,
    )
    return kept, recorded


def recorded(memory: Memory, **details: Any) -> MemoryRecorded:
    """The event of the log of record. `details` are the fields that only entities and relations have."""
    return MemoryRecorded(
        memory_id=str(memory.id),
        kind=memory.kind,
        version=memory.version,
        origin_id=memory.origin_id,
        occurred_at=memory.occurred_at,
        recorded_at=memory.recorded_at,
        importance=memory.importance,
        text=memory.text,
        conversation_id=memory.conversation_id,
        role=memory.role,
        speaker=memory.speaker,
        document_id=memory.document_id,
        title=memory.title,
        chunk_index=memory.chunk_index,
        chunk_count=memory.chunk_count,
        metadata=dict(memory.metadata),
        **{"entity_id": memory.entity_id, **details},
    )


def entity_details(data: EntityPublished) -> dict[str, Any]:
    """What MemoryRecorded says of an entity beside its text."""
    return {"entity_kind": data.kind, "aliases": data.aliases}


def relation_details(data: RelationPublished) -> dict[str, Any]:
    """What MemoryRecorded says of a relation."""
    names = ("source_entity_id", "relation", "target_entity_id", "weight", "valid_from", "valid_to")
    return {name: getattr(data, name) for name in names}


def ordering_key(memory: Memory, source_entity_id: str | None = None) -> bytes:
    """The Kafka key within which order holds: conversation, document or entity; an edge stays with the entity it starts from."""
    for kind, name in (
        ("conversation", memory.conversation_id),
        ("document", memory.document_id),
        ("entity", memory.entity_id),
        ("entity", source_entity_id),
    ):
        if name is not None:
            return aggregate_key(memory.tenant_id, kind, name)
    return aggregate_key(memory.tenant_id, "memory", str(memory.id))
