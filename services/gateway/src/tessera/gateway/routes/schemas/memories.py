"""Ingestion and search. The fields of an item are those of its event."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from tessera.contracts.base import Name, Text
from tessera.contracts.errors import Problem
from tessera.contracts.events import (
    DocumentPublished,
    EntityPublished,
    MemoryKind,
    MessagePublished,
    RecallFilter,
    RecallScores,
    RelationPublished,
)
from tessera.gateway.handlers.memories import Ingested
from tessera.gateway.routes.schemas.common import Body, View, Whole, as_written, examples
from tessera.gateway.routes.schemas.consistency import ConsistencyOptions, ReadView, WrittenView

EventId = Annotated[
    Text | None, Field(min_length=1, max_length=255, description="Your own id: the same id and body again changes nothing.")
]
SubjectId = Annotated[Name | None, Field(description="Whom the data is about: the unit of erasure.")]

_OWN_FIELDS = frozenset({"type", "id", "subject_id"})


class MessageItem(MessagePublished):
    """Somebody said something in a conversation."""

    model_config = examples(
        {
            "type": "message",
            "conversation_id": "visit-1",
            "role": "user",
            "content": "The key is under the third stone.",
        }
    )

    type: Literal["message"]
    id: EventId = None
    subject_id: SubjectId = None


class DocumentItem(DocumentPublished):
    """A longer text, which is split into chunks."""

    type: Literal["document"]
    id: EventId = None
    subject_id: SubjectId = None


class EntityItem(EntityPublished):
    """A named thing."""

    type: Literal["entity"]
    id: EventId = None
    subject_id: SubjectId = None


class RelationItem(RelationPublished):
    """A typed, weighted, dated edge between two entities."""

    type: Literal["relation"]
    id: EventId = None
    subject_id: SubjectId = None


IngestionItem = Annotated[
    Annotated[MessageItem, as_written(MessageItem, "occurred_at")]
    | Annotated[DocumentItem, as_written(DocumentItem, "occurred_at")]
    | Annotated[EntityItem, as_written(EntityItem)]
    | Annotated[RelationItem, as_written(RelationItem, "valid_from", "valid_to")],
    Field(discriminator="type"),
]
ITEMS: TypeAdapter[MessageItem | DocumentItem | EntityItem | RelationItem] = TypeAdapter(IngestionItem)

_EVENTS: dict[str, type[Ingested]] = {
    "message": MessagePublished,
    "document": DocumentPublished,
    "entity": EntityPublished,
    "relation": RelationPublished,
}


def event_of(item: MessageItem | DocumentItem | EntityItem | RelationItem) -> Ingested:
    """The event that an item becomes."""
    return _EVENTS[item.type].model_validate(item.model_dump(exclude=set(_OWN_FIELDS)))


class BatchBody(Body):
    """`POST /v1/memories/batch`: each item is judged on its own."""

    model_config = examples(
        {
            "items": [
                {"type": "entity", "entity_id": "ada", "name": "Ada Lovelace", "kind": "person"},
                {"type": "relation", "source_entity_id": "ada", "relation": "wrote_about", "target_entity_id": "analytical-engine"},
            ]
        }
    )

    items: Annotated[list[Any], Field(min_length=1, max_length=500, description="Items as `POST /v1/memories` takes them.")]


class AcceptedView(View):
    """The event will not be lost."""

    event_id: str
    status: Annotated[
        Literal["accepted", "spooled"],
        Field(description="accepted: in the log; spooled: the log is away, the event is on the gateway's disk and goes there."),
    ] = "accepted"
    consistency: WrittenView


class BatchItemView(View):
    """What became of one item."""

    index: int
    status: Literal["accepted", "spooled", "refused", "failed"]
    event_id: str | None = None
    consistency: WrittenView | None = None
    error: dict[str, str | None] | None = None


class BatchView(View):
    """One result per item, in order."""

    accepted: int
    spooled: int
    refused: int
    failed: int
    data: list[BatchItemView]
    consistency: Annotated[WrittenView | None, Field(description="One token for all that was accepted or spooled.")] = None


class IngestionView(View):
    """Where an ingested event stands."""

    event_id: str
    status: Annotated[
        Literal["unknown", "spooled", "applied", "searchable", "refused"],
        Field(
            description="unknown: not admitted yet, or never published; spooled: on this gateway's disk, waits for the log; "
            "applied: stored, and found by its words a moment later; searchable: by its meaning too; refused: see reason."
        ),
    ]
    memory_ids: list[str]
    reason: Problem | None
    consistency: Annotated[WrittenView | None, Field(description="Where it was applied: also for events that came by Kafka.")] = None


class SearchBody(Body):
    """`POST /v1/memories/search`."""

    model_config = examples({"query": "Where is the key?", "limit": 5, "filter": {"kinds": ["message"]}})

    query: Annotated[Text, Field(min_length=1, max_length=10_000)]
    limit: Annotated[Whole, Field(ge=1, le=100)] = 10
    filter: Annotated[RecallFilter, as_written(RecallFilter)] = RecallFilter()
    consistency: ConsistencyOptions | None = None


class MemoryView(View):
    """One memory that was found. `scores` says why it ranks where it does: the parts add up to `total`."""

    id: str
    kind: MemoryKind
    text: str
    scores: RecallScores
    occurred_at: str
    importance: float
    origin_id: Annotated[str, Field(description="Id of the event it came from.")]
    conversation_id: str | None = None
    role: str | None = None
    speaker: str | None = None
    document_id: str | None = None
    title: str | None = None
    chunk_index: int | None = None
    entity_id: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class SearchView(View):
    """Memories, best first."""

    object: Literal["list"] = "list"
    data: list[MemoryView]
    degraded: Annotated[list[str], Field(description="Dependencies that were missing; empty when the search was complete.")]
    consistency: ReadView
