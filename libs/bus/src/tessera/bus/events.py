"""What a handler receives, and where things are in the log."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

from tessera.contracts.base import EventData
from tessera.contracts.catalogue import REPLY_PARTITIONS
from tessera.contracts.values import value_class

D = TypeVar("D", bound=EventData)
D_co = TypeVar("D_co", bound=EventData, covariant=True)


class Position(NamedTuple):
    """One record's place in the log. `topic` is the catalogue's name, without an operator's prefix."""

    topic: str
    partition: int
    offset: int


@value_class
class Origin:
    """What a later effect inherits from the event that caused it; small and plain, so that job rows can store it."""

    tenant_id: str
    parent_id: str
    """Id of the causing event: ids of emitted events are derived from it."""
    request_id: str | None = None
    traceparent: str | None = None
    subject_id: str | None = None
    correlation_id: str | None = None
    """Id of the first event of the exchange; replies are matched by it."""
    reply_partition: int | None = None
    """Partition of the reply topic that the asker reads, where something was asked."""


@value_class
class Received(Generic[D_co]):
    """One event as a handler gets it: validated data and the CloudEvents attributes it came with."""

    data: D_co
    id: str
    source: str
    type: str
    time: datetime
    tenant_id: str
    subject_id: str | None
    request_id: str | None
    deadline: datetime | None
    traceparent: str | None
    sequence: int | None
    correlation_id: str | None
    key: bytes | None
    topic: str
    """Name in the catalogue's spelling, without an operator's prefix."""
    partition: int
    offset: int
    digest: bytes
    """16 bytes: the identity (tenant, source, id)."""

    @property
    def position(self) -> Position:
        """Where this event is in the log."""
        return Position(self.topic, self.partition, self.offset)

    @property
    def origin(self) -> Origin:
        """What effects of this event inherit."""
        return Origin(
            tenant_id=self.tenant_id,
            parent_id=self.id,
            request_id=self.request_id,
            traceparent=self.traceparent,
            subject_id=self.subject_id,
            correlation_id=self.correlation_id or self.id,
            reply_partition=reply_partition_of(self.data),
        )


@value_class
class Reply(Generic[D_co]):
    """One event of a stream and its place in the reply topic."""

    data: D_co
    partition: int
    offset: int


def reply_partition_of(data: EventData) -> int | None:
    """Where the asker of `data` listens: its own `reply_partition`, or that of the request it carries along; None where nobody asked."""
    may_ask, may_carry = _asking_fields(type(data))
    own = getattr(data, "reply_partition", None) if may_ask else None
    if own is None and may_carry:
        own = getattr(getattr(data, "request", None), "reply_partition", None)
    return known_reply_partition(own)


@cache
def _asking_fields(event_class: type[EventData]) -> tuple[bool, bool]:
    """Whether events of a class have `reply_partition`, and `request`: asking a model for a field that it has not is slow."""
    return "reply_partition" in event_class.model_fields, "request" in event_class.model_fields


def known_reply_partition(value: Any) -> int | None:
    """`value` if it is a partition of the reply topic, else None: nobody reads another one, and Kafka would refuse it for ever."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < REPLY_PARTITIONS else None
