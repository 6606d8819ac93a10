"""What memory keeps, as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from tessera.contracts.events import MemoryKind, Role

View = Literal["alone", "context"]
VIEWS: tuple[View, ...] = ("alone", "context")
"""The two forms in which a memory is indexed: by itself, and after what came just before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One retrievable item. `text` is None for a relation, which is kept but not searched."""

    tenant_id: str
    id: UUID
    kind: MemoryKind
    origin_id: str
    origin_digest: bytes
    occurred_at: datetime
    recorded_at: datetime
    importance: float
    text: str | None = None
    subject_id: str | None = None
    conversation_id: str | None = None
    role: Role | None = None
    speaker: str | None = None
    document_id: str | None = None
    title: str | None = None
    chunk_index: int | None = None
    chunk_count: int | None = None
    start: int | None = None
    """Where a chunk's text begins in its document, in characters."""
    end: int | None = None
    entity_id: str | None = None
    ordinal: int = 0
    """Order among what occurred at the same moment: the producer's sequence, or the chunk's index."""
    version: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def series(self) -> str | None:
        """The conversation or document in which this memory has neighbours."""
        if self.conversation_id is not None:
            return f"conversation:{self.conversation_id}"
        return f"document:{self.document_id}" if self.document_id is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """A named thing, with the memory by which it is found."""

    tenant_id: str
    entity_id: str
    name: str
    kind: str
    aliases: tuple[str, ...]
    description: str | None
    memory_id: UUID
    subject_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A typed, weighted, dated edge between two entities, either of which may be published later."""

    tenant_id: str
    source_entity_id: str
    relation: str
    target_entity_id: str
    weight: float
    valid_from: datetime | None
    valid_to: datetime | None
    memory_id: UUID
    subject_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What of a memory is written into its indexed forms."""

    occurred_at: datetime
    text: str
    said_by: str | None = None
    """Speaker, else role; none outside conversations."""
    title: str | None = None
