"""What a stateless handler emits with: events whose acknowledgements the bus awaits before it commits the offset."""

from __future__ import annotations

import asyncio
from datetime import datetime

from tessera.bus import faults
from tessera.bus.codec import encode
from tessera.bus.events import Origin
from tessera.bus.publisher import Publisher, Sent, acknowledged
from tessera.bus.transaction import caused_envelope
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import topic_of
from tessera.contracts.errors import InvalidError, Problem
from tessera.contracts.events import RequestFailed


class Emitter:
    """Emits events caused by one received event. Ids derive from it, so a repeat emits the same ids.

    Nothing is taken back: a handler that fails after emitting emits the same again when it is repeated.
    """

    def __init__(self, publisher: Publisher, origin: Origin, service: str, deadline: datetime | None = None) -> None:
        self._publisher = publisher
        self._service = service
        self._deadline = deadline
        self._sent: list[tuple[str, Sent]] = []
        self.origin = origin

    async def publish(
        self,
        data: EventData,
        *,
        step: str,
        index: int = 0,
        key: bytes | None = None,
        subject_id: str | None = None,
        tenant_id: str | None = None,
        sequence: int | None = None,
    ) -> str:
        """Sends `data` to its catalogue topic and returns the event's id; deadline, tenant, request and trace are inherited.

        Returns before the acknowledgement. Raises RetryableError when Kafka does not answer, InvalidError `event_too_large`.
        """
        return await self._emit(data, step, index, key=key, subject_id=subject_id, tenant_id=tenant_id, sequence=sequence)

    async def reply(self, data: EventData, *, step: str = "reply", index: int = 0) -> str:
        """Answers the request being handled on the partition that its asker reads; returns the event's id.

        Raises InvalidError `reply_partition_missing` when the event asks for no reply.
        """
        if self.origin.reply_partition is None:
            raise InvalidError("reply_partition_missing", "Nobody asked: there is no partition to reply to.")
        return await self._emit(data, step, index, partition=self.origin.reply_partition)

    async def fail(self, problem: Problem) -> str:
        """Answers that the request cannot be answered."""
        return await self.reply(RequestFailed(problem=problem), step="failure")

    async def settle(self) -> None:
        """Waits until everything emitted is acknowledged. Raises RetryableError when something is not."""
        sent, self._sent = self._sent, []
        await asyncio.gather(*(acknowledged(topic, future) for topic, future in sent))

    async def _emit(
        self,
        data: EventData,
        step: str,
        index: int,
        *,
        key: bytes | None = None,
        subject_id: str | None = None,
        tenant_id: str | None = None,
        sequence: int | None = None,
        partition: int | None = None,
    ) -> str:
        envelope = caused_envelope(
            self.origin, self._service, step, index, subject_id=subject_id, tenant_id=tenant_id, deadline=self._deadline, sequence=sequence
        )
        faults.reach(faults.HANDLED_BEFORE_EMIT)
        topic = topic_of(type(data)).name
        event_key = key or (self.origin.correlation_id or self.origin.parent_id).encode()
        self._sent.append((topic, await self._publisher.send(topic, encode(data, envelope), key=event_key, partition=partition)))
        return envelope.id
