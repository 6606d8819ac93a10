"""Asking over the log: requests whose answers, chunks and completions come back on a partition of the reply topic.

A process reads its reply partitions itself, outside groups, so a rebalance never stalls a stream. Two processes reading the same
partition is harmless: each takes only what it asked for.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from tessera.bus.codec import Envelope, decode, encode
from tessera.bus.errors import RequestFailedError, StreamExpiredError
from tessera.bus.events import Received, Reply
from tessera.bus.feeds import PartitionFeed
from tessera.bus.publisher import Publisher, as_retryable
from tessera.bus.records import Record
from tessera.bus.settings import KafkaSettings, ServiceSettings
from tessera.bus.stopping import stop_consumer
from tessera.bus.transaction import source_of
from tessera.contracts.base import EventData, RequestData
from tessera.contracts.catalogue import REPLY_PARTITIONS, TOPICS, topic_of
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.contracts.events import RequestFailed
from tessera.contracts.ids import uuid7
from tessera.resilience import deadline
from tessera.telemetry import current_traceparent, get_logger, metrics, span

_REPLY: Final = TOPICS["reply"]
_BACKLOG: Final = 4_096

_log = get_logger(__name__)

Waiting = asyncio.Queue[Reply[EventData] | None]


class Requests:
    """Sends requests and hands their replies to whoever waits. Belongs to one event loop."""

    def __init__(self, settings: ServiceSettings, publisher: Publisher, client_id: str) -> None:
        self._kafka: KafkaSettings = settings.kafka
        self._service = settings.service
        self._publisher = publisher
        self._client_id = client_id
        self._partitions = settings.reply_partitions or (zlib.crc32(settings.instance.encode()) % REPLY_PARTITIONS,)
        self._turn = 0
        self._answers: dict[str, asyncio.Future[EventData]] = {}
        self._streams: dict[str, list[Waiting]] = {}
        self._feed = PartitionFeed(
            self._kafka,
            client_id,
            _REPLY.name,
            self._partitions,
            from_beginning=False,
            receive=self._receive,
            kafka_answers=publisher.ping,
        )

    @property
    def reply_partition(self) -> int:
        """A partition that this process reads, for the next request. Stays valid for the process's life."""
        self._turn += 1
        return self._partitions[self._turn % len(self._partitions)]

    @property
    def partitions(self) -> tuple[int, ...]:
        """All partitions that this process reads."""
        return self._partitions

    async def next_offset(self, partition: int) -> int:
        """A place in one of our partitions before every reply to what is published from now on.

        `stream(…, after=(partition, it - 1))` misses none of them. Raises RetryableError when Kafka does not answer.
        """
        with as_retryable():
            return int(await self._feed.consumer.position(TopicPartition(self._kafka.physical(_REPLY.name), partition)))

    async def start(self) -> None:
        """Begins to read at the end of each partition; what is asked from now on will be seen."""
        await self._feed.start()

    def check_live(self) -> None:
        """Raises RetryableError when it no longer reads."""
        self._feed.check_live()

    async def stop(self) -> None:
        """Stops reading. Whoever still waits gets a cancelled future."""
        await self._feed.stop()
        for future in self._answers.values():
            future.cancel()

    async def ask(
        self,
        data: RequestData,
        *,
        tenant_id: str,
        request_id: str | None,
        timeout: timedelta | float,  # noqa: ASYNC109  (it is also the deadline that the request carries)
        key: bytes | None = None,
        subject_id: str | None = None,
        id: str | None = None,
        has_deadline: bool = True,
    ) -> EventData:
        """Publishes a request and returns its answer.

        `data.reply_partition` must be one of ours (`reply_partition`). The request carries the deadline, after which it has no effect;
        pass `has_deadline=False` for a command that must happen even if nobody waits any longer. Raises RequestFailedError with the
        answer's problem, TimedOutError when none came in time, RetryableError when Kafka does not answer.
        """
        limit = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        event_id = id or str(uuid7())
        until = datetime.now(UTC) + limit
        answer: asyncio.Future[EventData] = asyncio.get_running_loop().create_future()
        self._answers[event_id] = answer
        try:
            with span(f"ask {data.event_type}"):
                async with deadline(limit):
                    await self._send(
                        data,
                        event_id,
                        tenant_id=tenant_id,
                        request_id=request_id,
                        subject_id=subject_id,
                        key=key,
                        until=until if has_deadline else None,
                    )
                    return _answered(await answer)
        finally:
            self._answers.pop(event_id, None)

    @asynccontextmanager
    async def stream(self, generation_id: str, *, after: tuple[int, int] | None = None) -> AsyncIterator[AsyncIterator[Reply[EventData]]]:
        """All replies of one generation, in order, from now on; enter it before the request is published.

        A RequestFailed belongs to the stream when the request was published with the generation's id as event id. With
        `after=(partition, offset)` the partition is read again from behind that offset, also if another process read it first. The
        iterator does not end by itself: stop at a completion, a failure, or a deadline of your own. Raises StreamExpiredError when the
        log no longer holds the offset; the iterator raises RetryableError `stream_overflow` when its reader is some 4,000 replies behind.
        """
        if after is not None:
            async with self._replayed(generation_id, *after) as replies:
                yield replies
            return
        waiting: Waiting = asyncio.Queue(_BACKLOG)
        self._streams.setdefault(generation_id, []).append(waiting)
        try:
            yield _drained(waiting)
        finally:
            self._streams[generation_id].remove(waiting)
            if not self._streams[generation_id]:
                del self._streams[generation_id]

    async def _send(
        self,
        data: RequestData,
        event_id: str,
        *,
        tenant_id: str,
        request_id: str | None,
        subject_id: str | None,
        key: bytes | None,
        until: datetime | None,
    ) -> None:
        if data.reply_partition not in self._partitions:
            raise InvalidError(
                "reply_partition_unknown", "The request names a reply partition that this process does not read.", "reply_partition"
            )
        envelope = Envelope(
            id=event_id,
            source=source_of(self._service),
            tenant_id=tenant_id,
            subject_id=subject_id,
            request_id=request_id,
            deadline=until,
            traceparent=current_traceparent(),
        )
        await self._publisher.publish(topic_of(type(data)).name, encode(data, envelope), key=key or event_id.encode())

    async def _receive(self, records: tuple[Record, ...]) -> None:
        for record in records:
            event = _decoded(record)
            if event is not None:
                self._deliver(event)

    def _deliver(self, event: Received[EventData]) -> None:
        future = self._answers.get(event.correlation_id or "")
        if future is not None and not future.done():
            future.set_result(event.data)
        for waiting in self._streams.get(_stream_of(event), ()):
            _put(waiting, Reply(event.data, event.partition, event.offset))

    @asynccontextmanager
    async def _replayed(self, generation_id: str, partition: int, offset: int) -> AsyncIterator[AsyncIterator[Reply[EventData]]]:
        target = TopicPartition(self._kafka.physical(_REPLY.name), partition)
        if not 0 <= partition < REPLY_PARTITIONS or offset < -1:
            raise StreamExpiredError("There is no such position.")
        consumer = AIOKafkaConsumer(
            **self._kafka.connection(f"{self._client_id}-replay"),
            auto_offset_reset="none",
            fetch_max_wait_ms=self._kafka.fetch_max_wait_milliseconds,
        )
        with as_retryable():
            await consumer.start()
        try:
            consumer.assign([target])
            await _check_held(consumer, target, offset)
            consumer.seek(target, offset + 1)
            replies = _read(consumer, generation_id)
            try:
                yield replies
            finally:
                await replies.aclose()
        finally:
            await stop_consumer(consumer)


async def _check_held(consumer: AIOKafkaConsumer, target: TopicPartition, offset: int) -> None:
    with as_retryable():
        starts, ends = await consumer.beginning_offsets([target]), await consumer.end_offsets([target])
    if not starts[target] <= offset + 1 <= ends[target]:
        raise StreamExpiredError("The log no longer holds this position of the stream.")


async def _read(consumer: AIOKafkaConsumer, generation_id: str) -> AsyncGenerator[Reply[EventData], None]:
    while True:
        for records in (await consumer.getmany(timeout_ms=1_000)).values():
            for record in records:
                event = _decoded(record)
                if event is not None and _stream_of(event) == generation_id:
                    yield Reply(event.data, event.partition, event.offset)


def _put(waiting: Waiting, reply: Reply[EventData]) -> None:
    """The last place of a full queue is for the end: a reader must never miss a piece without being told."""
    if waiting.qsize() < _BACKLOG - 1:
        waiting.put_nowait(reply)
    elif not waiting.full():
        metrics.BUS_STREAM_OVERFLOWS.inc()
        waiting.put_nowait(None)


async def _drained(waiting: Waiting) -> AsyncGenerator[Reply[EventData], None]:
    while True:
        reply = await waiting.get()
        if reply is None:
            raise RetryableError("The stream's reader was too slow; it can resume from its last position.", code="stream_overflow")
        yield reply


def _stream_of(event: Received[EventData]) -> str:
    found: str | None = getattr(event.data, "generation_id", None)
    return found or event.correlation_id or ""


def _decoded(record: Record) -> Received[EventData] | None:
    try:
        return decode(record, _REPLY, _REPLY.name)
    except InvalidError as error:
        _log.warning("reply passed over", partition=record.partition, offset=record.offset, code=error.code)
        return None


def _answered(data: EventData) -> EventData:
    if isinstance(data, RequestFailed):
        raise RequestFailedError(data.problem)
    return data
