"""Ingestion and search."""

from dataclasses import dataclass
from typing import Literal

from tessera.bus import Position
from tessera.contracts import aggregate_key, body_digest, derived_id, uuid7
from tessera.contracts.base import MAXIMUM_EVENT_BYTES, EventData
from tessera.contracts.events import (
    AwaitedWrite,
    DocumentPublished,
    EntityPublished,
    IngestionInspected,
    IngestionReported,
    LogPlace,
    MessagePublished,
    ReadConsistency,
    RecallCompleted,
    RecallFilter,
    RecallRequested,
    RelationPublished,
)
from tessera.contracts.ids import identity_digest
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.spool import AcceptedEvent
from tessera.gateway.handlers.answering import expect
from tessera.gateway.handlers.consistency import Fresh, asked, checked
from tessera.gateway.handlers.handoff import Handoff
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


@dataclass(frozen=True)
class Taken:
    """An item that will not be lost, and what a read has to wait for to see it."""

    status: Literal["accepted", "spooled"]
    write: AwaitedWrite


async def ingest(handoff: Handoff, log: Log, item: Item, call: Call) -> Taken:
    """Hands the item over for the tenant's ingestion topic.

    Raises ApiError 413 `event_too_large`, 503 when neither Kafka nor the spool takes it.
    """
    if len(item.data.model_dump_json().encode()) > MAXIMUM_EVENT_BYTES:
        raise ApiError(413, "event_too_large", f"One item may have at most {MAXIMUM_EVENT_BYTES} bytes.")
    key = aggregate(call.tenant_id, item.data)
    event = log.accepted(item.data, call, event_id=item.event_id, key=key, subject_id=item.subject_id)
    handed = await handoff.hand_over(event)
    return Taken(handed.status, _write(event, handed.place))


def _write(event: AcceptedEvent, place: Position | None) -> AwaitedWrite:
    identity = identity_digest(event.tenant_id, event.source, event.event_id)
    where = LogPlace(topic=place.topic, partition=place.partition, offset=place.offset) if place else None
    return AwaitedWrite(identity=identity.hex(), body=body_digest(event.value).hex(), place=where)


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


async def search(log: Log, query: str, call: Call, *, limit: int, recall_filter: RecallFilter, fresh: Fresh) -> RecallCompleted:
    """The best memories of the caller's tenant, best first.

    Raises ApiError 503 `not_up_to_bound` or `write_pending`, 409 `write_refused` where they would be less fresh than wanted.
    """
    reply_partition = log.reply_partition

    def question(wanted: ReadConsistency) -> RecallRequested:
        asked_for = None if wanted.level == "eventual" else wanted
        return RecallRequested(reply_partition=reply_partition, query=query, limit=limit, filter=recall_filter, consistency=asked_for)

    found = expect(RecallCompleted, await asked(log, question, fresh, call))
    checked(found.freshness)
    return found
