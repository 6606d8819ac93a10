"""One record on its way to a handler: decoded, or the reason why it cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from tessera.bus.codec import attributes_of, decode, is_tenant_id, loose_data
from tessera.bus.deadletters import REPLAY_ATTEMPT
from tessera.bus.events import Origin, Position, Received, known_reply_partition
from tessera.bus.partitions import Assignment
from tessera.bus.records import Record
from tessera.bus.retries import waiting
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import RETRY_TOPICS
from tessera.contracts.errors import InvalidError, Problem
from tessera.contracts.values import value_class
from tessera.telemetry import bound, continued, span


@value_class
class Delivery:
    """A record with its event, or with what is wrong with it; exactly one of `event` and `fault` is there."""

    record: Record
    """As it came first."""
    event: Received[EventData] | None
    fault: InvalidError | None
    place: Position
    """Where it came first, in the catalogue's spelling."""
    offset: int
    """Where it was read now: another one in a retry topic."""

    @property
    def is_replay(self) -> bool:
        """Whether an operator sent it again."""
        return self.event is not None and REPLAY_ATTEMPT in [name for name, _ in self.record.headers]

    @property
    def ready(self) -> Received[EventData]:
        """The event. Raises the fault where there is none."""
        if self.event is None:
            raise self.fault or InvalidError("data_malformed", "The record holds no event.")
        return self.event


def delivered(record: Record, assignment: Assignment) -> Delivery:
    """Decodes a record. Never raises."""
    retry = RETRY_TOPICS.get(assignment.name)
    place = Position(assignment.name, record.partition, record.offset)
    offset = record.offset
    try:
        if retry is not None:
            found = waiting(record, retry)
            record, place = found.record, found.place
        return Delivery(record, decode(record, assignment.topic, place.topic), None, place, offset)
    except InvalidError as fault:
        return Delivery(record, None, fault, place, offset)


def expired(event: Received[EventData]) -> bool:
    """Whether nobody waits for the answer any longer (rules of the log, 18)."""
    return event.deadline is not None and event.deadline <= datetime.now(UTC)


UNAVAILABLE = Problem(code="dependency_unavailable", message="A dependency did not recover in time.", status=503)
EXPIRED = Problem(code="expired", message="The request's deadline had passed before it was handled; it had no effect.", status=504)


@contextmanager
def handling(event: Received[EventData], group: str) -> Iterator[None]:
    """Continues the event's trace and binds its request and tenant to every log line of the block."""
    with (
        continued(event.traceparent),
        bound(request_id=event.request_id, tenant_id=event.tenant_id),
        span(f"consume {event.type}", **_attributes(event, group)),
    ):
        yield


@contextmanager
def handling_together(events: Sequence[Received[EventData]], group: str) -> Iterator[None]:
    """One span for all of them; each event's own trace goes on in what it publishes."""
    first = events[0]
    with span(f"consume {first.type}", **{**_attributes(first, group), "messaging.batch.message_count": len(events)}):
        yield


def _attributes(event: Received[EventData], group: str) -> dict[str, str | int]:
    """Names of OpenTelemetry's messaging conventions. No key and no content."""
    return {
        "messaging.system": "kafka",
        "messaging.destination.name": event.topic,
        "messaging.destination.partition.id": event.partition,
        "messaging.kafka.offset": event.offset,
        "messaging.consumer.group.name": group,
        "messaging.message.id": event.id,
    }


def loose_origin(record: Record) -> Origin | None:
    """Who asked, of an event that does not validate, as far as that can be read; None where nobody listens for an answer. Never raises."""
    partition = _loose_reply_partition(record)
    attributes = attributes_of(record.headers)
    identifier, tenant_id = attributes.get("id"), attributes.get("tenantid")
    if partition is None or not identifier or not tenant_id or not is_tenant_id(tenant_id):
        return None
    return Origin(
        tenant_id=tenant_id,
        parent_id=identifier,
        request_id=attributes.get("requestid"),
        correlation_id=attributes.get("correlationid") or identifier,
        reply_partition=partition,
    )


def _loose_reply_partition(record: Record) -> int | None:
    data = loose_data(record.value)
    if not isinstance(data, dict):
        return None
    request = data.get("request")
    return known_reply_partition(data.get("reply_partition", request.get("reply_partition") if isinstance(request, dict) else None))
