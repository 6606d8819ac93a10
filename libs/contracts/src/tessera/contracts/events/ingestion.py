"""What producers publish on `ingest` and `ingest.<tenant>`. Read closed: a typo is refused and told."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tessera.contracts.base import NO_METADATA, Content, DocumentContent, EventData, Fraction, Metadata, Moment, Name, RequestData, Text
from tessera.contracts.errors import Problem
from tessera.contracts.events.consistency import AwaitedWrite
from tessera.contracts.sealing import Sealable

Role = Literal["system", "user", "assistant", "tool"]


class MessagePublished(EventData):
    """Somebody said something in a conversation."""

    event_type: ClassVar[str] = "tessera.message.published.v1"

    conversation_id: Name
    role: Role
    content: Sealable[Content]
    speaker: Annotated[Name | None, Field(description="Who spoke, where the role is not enough.")] = None
    occurred_at: Annotated[Moment | None, Field(description="When it was said; the event's time where absent.")] = None
    importance: Annotated[Fraction | None, Field(description="Replaces the computed importance.")] = None
    metadata: Metadata = NO_METADATA


class DocumentPublished(EventData):
    """A longer text, which is split into chunks."""

    event_type: ClassVar[str] = "tessera.document.published.v1"

    document_id: Name
    content: Sealable[DocumentContent]
    title: Annotated[Text | None, Field(max_length=512)] = None
    media_type: Literal["text/plain", "text/markdown"] = "text/plain"
    occurred_at: Moment | None = None
    importance: Fraction | None = None
    metadata: Metadata = NO_METADATA


class EntityPublished(EventData):
    """A named thing."""

    event_type: ClassVar[str] = "tessera.entity.published.v1"

    entity_id: Name
    name: Name
    kind: Annotated[Name, Field(description="person, place, organisation, product, …")]
    aliases: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    description: Annotated[Text | None, Field(max_length=10_000)] = None
    metadata: Metadata = NO_METADATA


class RelationPublished(EventData):
    """A typed, weighted, dated edge between two entities."""

    event_type: ClassVar[str] = "tessera.relation.published.v1"

    source_entity_id: Name
    relation: Name
    target_entity_id: Name
    weight: Fraction = 1.0
    valid_from: Moment | None = None
    valid_to: Moment | None = None
    metadata: Metadata = NO_METADATA

    @model_validator(mode="after")
    def _validity_in_order(self) -> RelationPublished:
        if self.valid_from and self.valid_to and self.valid_to < self.valid_from:
            raise ValueError("valid_to is before valid_from")
        return self


class EventRefused(EventData):
    """An event that was refused, told where its producer can see it."""

    event_type: ClassVar[str] = "tessera.event.refused.v1"

    refused_id: Annotated[str, Field(max_length=512, description="The id its producer gave it; empty where it had none.")]
    refused_source: Annotated[str, Field(max_length=2_048)]
    refused_type: Annotated[str, Field(max_length=256)]
    reason: Problem
    topic: str
    partition: int
    offset: int


class IngestionInspected(RequestData):
    """What became of an ingested event?"""

    event_type: ClassVar[str] = "tessera.ingestion.inspected.v1"

    event_id: Annotated[str, Field(min_length=1, max_length=512)]


class IngestionReported(EventData):
    """Where an ingested event stands."""

    event_type: ClassVar[str] = "tessera.ingestion.reported.v1"

    event_id: str
    state: Annotated[
        Literal["unknown", "applied", "searchable", "refused"],
        Field(description="unknown: not admitted yet, or never published; applied: stored; searchable: embedded too."),
    ]
    memory_ids: tuple[str, ...] = ()
    reason: Problem | None = None
    writes: Annotated[tuple[AwaitedWrite, ...], Field(description="The events of that id that were applied, for a consistency token.")] = ()
