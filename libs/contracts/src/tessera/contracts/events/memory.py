"""The log of record, recall and embeddings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tessera.contracts.base import NO_METADATA, EventData, Fraction, Metadata, Moment, Name, Record, RequestData, Text
from tessera.contracts.events.consistency import Freshness, ReadConsistency
from tessera.contracts.events.ingestion import Role
from tessera.contracts.sealing import Sealable

MemoryKind = Literal["message", "chunk", "entity", "relation"]
RecallState = Literal["not_asked", "complete", "degraded"]


class MemoryRecorded(EventData):
    """memory admitted something: the log of record, keyed by hash(tenant, conversation | document | entity)."""

    event_type: ClassVar[str] = "tessera.memory.recorded.v1"

    memory_id: Name
    kind: MemoryKind
    version: Annotated[int, Field(ge=1)] = 1
    origin_id: Annotated[str, Field(description="Id of the ingested event.", max_length=512)]
    occurred_at: Moment
    recorded_at: Moment
    importance: Fraction
    text: Annotated[Sealable[Text] | None, Field(description="What is searched; none for a relation.")] = None
    conversation_id: Name | None = None
    role: Role | None = None
    speaker: Name | None = None
    document_id: Name | None = None
    title: Annotated[Text | None, Field(max_length=512)] = None
    chunk_index: Annotated[int | None, Field(ge=0)] = None
    chunk_count: Annotated[int | None, Field(ge=1)] = None
    entity_id: Name | None = None
    entity_kind: Name | None = None
    aliases: tuple[Name, ...] = ()
    source_entity_id: Name | None = None
    relation: Name | None = None
    target_entity_id: Name | None = None
    weight: Fraction | None = None
    valid_from: Moment | None = None
    valid_to: Moment | None = None
    metadata: Metadata = NO_METADATA


class MemoryChanged(EventData):
    """A memory has a new version."""

    event_type: ClassVar[str] = "tessera.memory.changed.v1"

    memory_id: Name
    version: Annotated[int, Field(ge=1)]
    change: Literal["archived", "archive_skipped"]
    reason: Annotated[str | None, Field(max_length=256)] = None
    sweep_id: Name | None = None
    changed_at: Moment


class ArchivedItem(Record):
    """One memory that retention wants archived, at the version it looked at."""

    memory_id: Name
    version: Annotated[int, Field(ge=1)]


class ArchiveRequested(EventData):
    """retention asks memory to archive these, each only at the version named."""

    event_type: ClassVar[str] = "tessera.archive.requested.v1"

    sweep_id: Name
    items: Annotated[tuple[ArchivedItem, ...], Field(min_length=1, max_length=200)]


class RecallFilter(Record):
    """Which memories may be found at all."""

    conversation_id: Name | None = None
    document_id: Name | None = None
    kinds: Annotated[tuple[MemoryKind, ...], Field(max_length=4)] = ()


class RecallRequested(RequestData):
    """Search memory."""

    event_type: ClassVar[str] = "tessera.recall.requested.v1"

    query: Sealable[Annotated[Text, Field(min_length=1, max_length=10_000)]]
    limit: Annotated[int, Field(ge=1, le=100)] = 10
    filter: RecallFilter = RecallFilter()
    consistency: Annotated[ReadConsistency | None, Field(description="None: whatever is there.")] = None


class RecallScores(Record):
    """Why a memory ranked where it did. Parts are what they add to `total`; ranks count from 1."""

    total: float
    vector: float = 0.0
    lexical: float = 0.0
    importance: float = 0.0
    recency: float = 0.0
    vector_similarity: Annotated[float | None, Field(description="Cosine; none where the vector was not compared.")] = None
    lexical_score: Annotated[float | None, Field(description="BM25; none where no term matched.")] = None
    vector_rank: int | None = None
    lexical_rank: int | None = None


class RecalledMemory(Record):
    """One memory that was found."""

    memory_id: Name
    kind: MemoryKind
    text: Sealable[Text]
    scores: RecallScores
    occurred_at: Moment
    importance: Fraction
    origin_id: str
    conversation_id: Name | None = None
    role: Role | None = None
    speaker: Name | None = None
    document_id: Name | None = None
    title: str | None = None
    chunk_index: int | None = None
    entity_id: Name | None = None
    metadata: Metadata = NO_METADATA


class RecallCompleted(EventData):
    """The answer to a search, best first."""

    event_type: ClassVar[str] = "tessera.recall.completed.v1"

    memories: tuple[RecalledMemory, ...]
    degraded: Annotated[tuple[str, ...], Field(description="Dependencies that were missing, such as `embedder`.")] = ()
    freshness: Freshness | None = None


class EmbeddingRequested(RequestData):
    """Turn texts into vectors."""

    event_type: ClassVar[str] = "tessera.embedding.requested.v1"

    model: Name
    inputs: Annotated[tuple[Annotated[Text, Field(min_length=1, max_length=100_000)], ...], Field(min_length=1, max_length=256)]


class EmbeddingCompleted(EventData):
    """The vectors, in the order of the inputs, each of unit length."""

    event_type: ClassVar[str] = "tessera.embedding.completed.v1"

    model: Name
    vectors: tuple[tuple[float, ...], ...]
    token_counts: tuple[int, ...]
