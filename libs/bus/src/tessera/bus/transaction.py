"""The unit of work that a transactional handler gets: state and outgoing events commit together or not at all."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus.codec import Envelope, encode
from tessera.bus.events import Origin, Received
from tessera.bus.outbox import OutboxRow
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import topic_of
from tessera.contracts.errors import InvalidError
from tessera.contracts.ids import derived_id_text
from tessera.telemetry import current_traceparent


def source_of(service: str) -> str:
    """The CloudEvents source of a service's own events."""
    return f"/tessera/{service}"


class Transaction:
    """One Postgres transaction on behalf of one event (or one step of a job). The bus opens and commits it.

    What is published becomes visible only with the commit, in the order of the calls. Ids derive from the causing event, so a repeat
    publishes the same ids.
    """

    def __init__(
        self, connection: AsyncConnection, origin: Origin, service: str, rows: list[OutboxRow], *, traceparent: str | None = None
    ) -> None:
        self._traceparent = traceparent
        self._connection = connection
        self._rows = rows
        self._service = service
        self.origin = origin

    @property
    def connection(self) -> AsyncConnection:
        """The open connection, in the worker's role. Never commit or roll back on it."""
        return self._connection

    async def publish(
        self,
        data: EventData,
        *,
        step: str,
        index: int = 0,
        key: bytes | None = None,
        subject_id: str | None = None,
        tenant_id: str | None = None,
        deadline: datetime | None = None,
        sequence: int | None = None,
    ) -> str:
        """Publishes `data` on its catalogue topic when the transaction commits, and returns the event's id.

        (step, index) must be unique among what the causing event publishes from this service. Without `key` the key is the id of the
        exchange's first event. Raises InvalidError `event_too_large`.
        """
        return self._add(data, step, index, key=key, subject_id=subject_id, tenant_id=tenant_id, deadline=deadline, sequence=sequence)

    async def reply(self, data: EventData, *, step: str = "reply", index: int = 0, partition: int | None = None) -> str:
        """Answers the request being handled, when the transaction commits, on the partition that its asker reads; returns the event's id.

        Raises InvalidError `reply_partition_missing` when nothing was asked and no partition is given.
        """
        target = partition if partition is not None else self.origin.reply_partition
        if target is None:
            raise InvalidError("reply_partition_missing", "Nobody asked: there is no partition to reply to.")
        return self._add(data, step, index, partition=target)

    def _add(
        self,
        data: EventData,
        step: str,
        index: int,
        *,
        key: bytes | None = None,
        subject_id: str | None = None,
        tenant_id: str | None = None,
        deadline: datetime | None = None,
        sequence: int | None = None,
        partition: int | None = None,
    ) -> str:
        envelope = caused_envelope(
            self.origin,
            self._service,
            step,
            index,
            subject_id=subject_id,
            tenant_id=tenant_id,
            deadline=deadline,
            sequence=sequence,
            traceparent=self._traceparent,
        )
        row_key = key or (self.origin.correlation_id or self.origin.parent_id).encode()
        self._rows.append(OutboxRow(envelope.id, topic_of(type(data)).name, row_key, encode(data, envelope), partition))
        return envelope.id


class BatchTransaction:
    """One Postgres transaction on behalf of several events. The bus opens and commits it."""

    def __init__(self, connection: AsyncConnection, service: str, rows: list[OutboxRow]) -> None:
        self._connection = connection
        self._service = service
        self._rows = rows

    @property
    def connection(self) -> AsyncConnection:
        """The open connection, in the worker's role. Never commit or roll back on it."""
        return self._connection

    def of(self, event: Received[EventData]) -> Transaction:
        """The same transaction on behalf of one of the events: what it publishes derives from that event and follows its trace."""
        return Transaction(self._connection, event.origin, self._service, self._rows, traceparent=event.traceparent)


def caused_envelope(
    origin: Origin,
    service: str,
    step: str,
    index: int,
    *,
    subject_id: str | None = None,
    tenant_id: str | None = None,
    deadline: datetime | None = None,
    sequence: int | None = None,
    traceparent: str | None = None,
) -> Envelope:
    """The attributes of an event caused by `origin`: a derived id, and tenant, request, subject and trace inherited."""
    return Envelope(
        id=derived_id_text(origin.parent_id, step, index),
        source=source_of(service),
        tenant_id=tenant_id or origin.tenant_id,
        subject_id=subject_id or origin.subject_id,
        request_id=origin.request_id,
        deadline=deadline,
        traceparent=traceparent or current_traceparent() or origin.traceparent,
        sequence=sequence,
        correlation_id=origin.correlation_id or origin.parent_id,
    )
