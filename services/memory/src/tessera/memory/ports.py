"""What the handlers and workers need from outside, as protocols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol
from uuid import UUID

from tessera.bus.consistency import Partition, Seen, Target
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import TOPICS, ingestion_topic
from tessera.contracts.errors import Problem
from tessera.contracts.events import AwaitedWrite, RecallFilter
from tessera.memory.domain.freshness import Indexing
from tessera.memory.domain.fusion import Candidate, Extent
from tessera.memory.domain.records import Entity, Memory, Relation

TenantState = Literal["active", "suspended"]


def ingestion_topics(tenant_id: str) -> tuple[str, str]:
    """The topics that a tenant's events come on."""
    return TOPICS["ingest"].name, ingestion_topic(tenant_id)


Vector = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A unit vector and the tokens it was made from, the model's own start and end tokens included."""

    vector: Vector
    tokens: int


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def model_id(self) -> str:
        """Names the space that vectors live in: only vectors of one model can be compared."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """One per text, in order. Does not block the loop. Raises CircuitOpenError or RetryableError when it cannot be used now."""
        ...


class QueryEmbedder(Protocol):
    """Turns a question into a vector, or says that this cannot be done now."""

    async def vector(self, tenant_id: str, query: str) -> Vector | None:
        """None when the embedder is down: the caller degrades. Never raises for that."""
        ...


@dataclass(frozen=True, slots=True)
class Archived:
    """What became of one memory that was to be archived. `version` is the memory's after that."""

    memory_id: str
    version: int
    skipped: str | None = None
    """Why it was left alone: `unknown`, `version_changed` or `already_archived`."""


class AdmissionUnit(Protocol):
    """The unit of work of one ingested event: all of it commits, or none."""

    async def tenant_state(self, tenant_id: str) -> TenantState | None:
        """None for a tenant that was never declared."""
        ...

    async def add(self, memories: Sequence[Memory]) -> list[Memory]:
        """Stores those that are not there yet, asks for their indexing, notes which entities they name; returns them."""
        ...

    async def supersede(
        self, tenant_id: str, *, document_id: str | None = None, entity_id: str | None = None, keep: bytes
    ) -> list[Archived]:
        """Archives what earlier events said of the same document or entity; `keep` is the digest of the event that replaces it."""
        ...

    async def put_entity(self, entity: Entity) -> None:
        """Stores the entity in place of what was known of it, and notes which memories name it."""
        ...

    async def put_relation(self, relation: Relation) -> None:
        """Stores the edge."""
        ...

    async def publish(self, data: EventData, *, step: str, index: int = 0, key: bytes | None = None, subject_id: str | None = None) -> str:
        """Publishes with the commit."""
        ...


class ArchiveUnit(Protocol):
    """The unit of work of one archive request."""

    async def archive(self, tenant_id: str, items: Sequence[tuple[UUID, int]], reason: str) -> list[Archived]:
        """Archives each at the version named, in the order given: no longer recalled, removed from every index."""
        ...

    async def publish(self, data: EventData, *, step: str, index: int = 0, key: bytes | None = None, subject_id: str | None = None) -> str:
        """Publishes with the commit."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """What is searched, with which vector (none: lexical only) and terms."""

    vector: Vector | None
    model_id: str
    terms: dict[int, int]
    filter: RecallFilter
    limit: int
    embedding_seconds: float = 0.0
    """What it took to make the vector."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the indexes put forward for one question, and the extent of each view over everything searched."""

    candidates: list[Candidate[UUID]]
    extent: Extent


@dataclass(frozen=True, slots=True)
class IngestionState:
    """What is known of an ingested event."""

    memory_ids: tuple[str, ...] = ()
    pending: bool = False
    refusal: Problem | None = None
    writes: tuple[AwaitedWrite, ...] = ()
    """The events of that id that were applied; of several sources several."""


class Snapshot(Protocol):
    """One tenant's memory at one moment; nothing of another tenant exists in it."""

    async def find(self, question: Question) -> Found:
        """The best candidates of each view, exactly: every memory of the tenant that passes the filter was compared."""
        ...

    async def memories(self, ids: Sequence[UUID]) -> dict[UUID, Memory]:
        """The active ones among `ids`."""
        ...

    async def ingestion(self, event_id: str) -> IngestionState:
        """What became of the producer's event."""
        ...

    async def seen(self, target: Target) -> Seen:
        """What this snapshot shows of ingestion, as far as it concerns `target`."""
        ...

    async def indexing(self, target: Target) -> Indexing:
        """The index work of new memories that is left in this snapshot."""
        ...


class MemoryStore(Protocol):
    """Where memories are read on behalf of a tenant."""

    def snapshot(self, tenant_id: str) -> AbstractAsyncContextManager[Snapshot]:
        """Raises CircuitOpenError or RetryableError when the store cannot be used now."""
        ...


@dataclass(frozen=True, slots=True)
class Indexable:
    """A memory whose index entries are due, with its text in both views."""

    tenant_id: str
    memory_id: UUID
    alone: str
    context: str


Stage = Literal["lexical", "vector"]
"""Two stages, so that a memory can be found by its words while the embedder is down."""


class IndexBatch(Protocol):
    """Claimed work of one stage, held until the transaction ends; a worker that dies gives it back."""

    @property
    def items(self) -> Sequence[Indexable]:
        """What is to be indexed; memories archived meanwhile are left out."""
        ...

    @property
    def claimed(self) -> int:
        """How many tasks were taken."""
        ...

    async def write_terms(self, counts: Sequence[tuple[Counter[int], Counter[int]]]) -> None:
        """Writes the lexical entries: per item the term counts alone and in context. Keeps the tenant's term statistics."""
        ...

    async def write_vectors(self, vectors: Sequence[tuple[Vector, Vector]], model_id: str) -> None:
        """Writes the vectors: per item alone and in context."""
        ...


class IndexQueue(Protocol):
    """Index work that admission and archiving left behind."""

    def claim(self, stage: Stage, limit: int) -> AbstractAsyncContextManager[IndexBatch]:
        """The oldest due tasks that no other worker holds. Leaving the block well commits what was written and ends the tasks."""
        ...


class LogEnds(Protocol):
    """Where the log ends."""

    async def of(self, topics: Sequence[str], *, not_older_than: timedelta = timedelta(0)) -> dict[Partition, int]:
        """Per partition the end as it was at some moment within `not_older_than` before the call. Raises RetryableError without Kafka."""
        ...


class Tenants(Protocol):
    """The known tenants, as a projection of the log."""

    async def caught_up(self) -> None:
        """Returns when every declaration that was in the log at the call is known here."""
        ...
