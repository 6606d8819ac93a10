"""Ingestion and search."""

from dataclasses import dataclass

from tessera.contracts import aggregate_key, derived_id, uuid7
from tessera.contracts.base import MAXIMUM_EVENT_BYTES, EventData
from tessera.contracts.events import (
    DocumentPublished,
    EntityPublished,
    IngestionInspected,
    IngestionReported,
    MessagePublished,
    RecallCompleted,
    RecallFilter,
    RecallRequested,
    RelationPublished,
)
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.answering import expect
from tessera.gateway.handlers.handoff import HandedOver, Handoff
from tessera.gateway.ports import Call, Log

Ingested = MessagePublished | DocumentPublished | EntityPublished | RelationPublished


@dataclass(frozen=True)
class Item:
    """One thing to remember. `event_id` makes a repeat harmless."""

    data: Ingested
    event_id: str
    subject_id: str | None


def item_id(tenant_id: str, given: str | None, idempotency_key: str | None, index: int = 0) -> str:
    """The caller's own id, else one derived from the Idempotency-Key, else a new one."""
    if given is not None:
        return given
    if idempotency_key is None:
        return str(uuid7())
    return str(derived_id(f"{tenant_id}\x00{idempotency_key}", "ingestion", index))


async def ingest(handoff: Handoff, log: Log, item: Item, call: Call) -> HandedOver:
    """Hands the item over for the tenant's ingestion topic.

    Raises ApiError 413 `event_too_large`, 503 when neither Kafka nor the spool takes it.
    """
    if len(item.data.model_dump_json().encode()) > MAXIMUM_EVENT_BYTES:
        raise ApiError(413, "event_too_large", f"One item may have at most {MAXIMUM_EVENT_BYTES} bytes.")
    key = aggregate(call.tenant_id, item.data)
    return await handoff.hand_over(log.accepted(item.data, call, event_id=item.event_id, key=key, subject_id=item.subject_id))


def aggregate(tenant_id: str, data: EventData) -> bytes:
    """The Kafka key: what belongs together stays in order."""
    match data:
        case MessagePublished(conversation_id=name):
            return aggregate_key(tenant_id, "conversation", name)
        case DocumentPublished(document_id=name):
            return aggregate_key(tenant_id, "document", name)
        case EntityPublished(entity_id=name) | RelationPublished(source_entity_id=name):
            return aggregate_key(tenant_id, "entity", name)
    raise TypeError(f"{type(data).__name__} is not ingested")


async def inspect(log: Log, event_id: str, call: Call) -> IngestionReported:
    """Where an ingested event stands."""
    asked = IngestionInspected(reply_partition=log.reply_partition, event_id=event_id)
    return expect(IngestionReported, await log.ask(asked, call))


async def search(log: Log, query: str, call: Call, *, limit: int, recall_filter: RecallFilter) -> RecallCompleted:
    """The best memories of the caller's tenant, best first."""
    asked = RecallRequested(reply_partition=log.reply_partition, query=query, limit=limit, filter=recall_filter)
    return expect(RecallCompleted, await log.ask(asked, call))
