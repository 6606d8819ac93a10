"""The process's one producer: acks=all, idempotent, no linger (5 ms of linger cost 5 ms per hop).

A record that the broker refuses, or that is given up before it was sent, leaves a gap in the idempotent sequence of its partition: the
broker then refuses everything later from this producer. So the first record that is not acknowledged ends the producer. Nothing
further leaves it, all that waited in it fails as retryable, and the next send begins with a new one. That also keeps the order:
nothing that was handed over later can arrive while the earlier record has not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import murmur2
from aiokafka.structs import RecordMetadata

from tessera.bus.codec import Encoded
from tessera.bus.events import Position
from tessera.bus.settings import KafkaSettings
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.telemetry import get_logger, metrics

MAXIMUM_REQUEST_BYTES: Final = 2 * 1024 * 1024
"""Above our own limit of 900 KiB for data: a dead letter carries the original and the reason."""

_REFUSALS: Final = (ClusterAuthorizationFailedError, GroupAuthorizationFailedError, TopicAuthorizationFailedError)

_BATCH_BYTES: Final = 128 * 1024
_REMEMBERED_KEYS: Final = 65_536

Sent = asyncio.Future[RecordMetadata]

_log = get_logger(__name__)


class Publisher:
    """Sends encoded events. Order holds per key, also over failures; use it from one event loop."""

    def __init__(self, kafka: KafkaSettings, client_id: str) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._producer: AIOKafkaProducer | None = None
        self._ended = False
        """The producer has a gap and must be replaced."""
        self._replacement: asyncio.Task[AIOKafkaProducer] | None = None

    async def start(self) -> None:
        """Connects; does nothing when connected. Raises RetryableError while no broker answers."""
        if self._producer is None:
            self._producer = await self._started()

    async def _started(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **self._kafka.connection(self._client_id),
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=_BATCH_BYTES,
            max_request_size=MAXIMUM_REQUEST_BYTES,
        )
        runs = False
        try:
            with as_retryable():
                await producer.start()
            runs = True
        finally:
            if not runs:
                await producer.stop()
        return producer

    async def stop(self) -> None:
        """Sends what is buffered and disconnects."""
        replacement, self._replacement = self._replacement, None
        if replacement is not None:
            replacement.cancel()
            await asyncio.gather(replacement, return_exceptions=True)
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()

    async def send(self, topic: str, encoded: Encoded, *, key: bytes | None = None, partition: int | None = None) -> Sent:
        """Hands a record over; the returned future is done when every in-sync replica has it. Waits only while the buffer is full.

        Raises RetryableError when Kafka does not answer, InvalidError `event_too_large` for a record above the producer's limit.
        """
        producer = await self._sound()
        with as_retryable():
            sent: Sent = await producer.send(
                self._kafka.physical(topic), encoded.value, key=key, partition=partition, headers=encoded.headers
            )
        sent.add_done_callback(partial(self._outcome, producer))
        metrics.BUS_PUBLISHED.labels(topic=_label(topic)).inc()
        return sent

    async def publish_batch(self, topic: str, partition: int, records: Sequence[tuple[bytes | None, Encoded]]) -> int:
        """Publishes as many of the first records (key, event) as one batch takes, and waits for the acknowledgement of all of them.

        Returns how many those were: at least one. Raises as `send` does; then none of them is acknowledged.
        """
        producer = await self._sound()
        batch = producer.create_batch()
        taken = 0
        while taken < len(records) and _added(batch, *records[taken]):
            taken += 1
        batch.close()
        with as_retryable():
            sent: Sent = await producer.send_batch(batch, self._kafka.physical(topic), partition=partition)
        sent.add_done_callback(partial(self._outcome, producer))
        await acknowledged(topic, sent)
        metrics.BUS_PUBLISHED.labels(topic=_label(topic)).inc(taken)
        return taken

    async def publish(self, topic: str, encoded: Encoded, *, key: bytes | None = None, partition: int | None = None) -> Position:
        """Sends a record and waits for the acknowledgement of all in-sync replicas. Raises as `send` does."""
        return await acknowledged(topic, await self.send(topic, encoded, key=key, partition=partition))

    async def partitions(self, topic: str) -> frozenset[int]:
        """The partitions of a topic that exists. Raises RetryableError when Kafka does not answer."""
        producer = await self._sound()
        with as_retryable():
            return frozenset(await producer.partitions_for(self._kafka.physical(topic)))

    async def ping(self) -> None:
        """Raises when no broker answers."""
        producer = await self._sound()
        with as_retryable():
            answered = await producer.client.force_metadata_update()  # of what was published to: a cluster may have many topics
        if not answered:
            raise RetryableError("No broker answers.", code="broker_unavailable")

    async def _sound(self) -> AIOKafkaProducer:
        """The producer; a new one in place of one that ended. Raises RetryableError while no broker answers."""
        producer = self._producer
        if producer is None:
            raise RetryableError("The producer is not running.", code="broker_unavailable")
        if not self._ended:
            return producer
        if self._replacement is None or self._replacement.done():
            self._replacement = asyncio.create_task(self._replaced(producer), name="producer-replacement")
        # Shielded: one caller's time-out must not leave a producer half closed or half started.
        return await asyncio.shield(self._replacement)

    async def _replaced(self, producer: AIOKafkaProducer) -> AIOKafkaProducer:
        await producer.stop()
        self._producer = started = await self._started()
        self._ended = False
        return started

    def _outcome(self, producer: AIOKafkaProducer, sent: Sent) -> None:
        """Ends the producer at once when a record was not acknowledged: before it can send what was handed over later."""
        if sent.cancelled() or (error := sent.exception()) is None or producer is not self._producer or self._ended:
            return
        self._ended = True
        _log.warning("a record was not acknowledged: the producer is replaced", error=repr(error))
        metrics.BUS_PRODUCERS_REPLACED.inc()
        _end(producer)


def _end(producer: AIOKafkaProducer) -> None:
    """Stops sending without sending what waits, for which aiokafka has no method: `stop` would flush it."""
    sender: Any = producer._sender
    if sender.sender_task is not None:
        sender.sender_task.cancel()
    producer._message_accumulator.fail_all(KafkaError("an earlier record was not acknowledged"))


def _added(batch: Any, key: bytes | None, encoded: Encoded) -> bool:
    return batch.append(timestamp=None, key=key, value=encoded.value, headers=encoded.headers) is not None


def partition_of(key: bytes, partitions: Sequence[int]) -> int:
    """The partition that every Kafka client chooses for a key, among all partitions of a topic in ascending order."""
    return partitions[_hash(key) % len(partitions)]


@lru_cache(maxsize=_REMEMBERED_KEYS)
def _hash(key: bytes) -> int:
    """aiokafka computes it in Python: a third of what sending a record costs. Keys come again and again."""
    return int(murmur2(key)) & 0x7FFFFFFF


async def acknowledged(topic: str, sent: Sent) -> Position:
    """Waits for the acknowledgement. Raises RetryableError when it does not come."""
    with as_retryable():
        metadata = await asyncio.shield(sent)
    return Position(topic, metadata.partition, metadata.offset)


@contextmanager
def as_retryable() -> Iterator[None]:
    """Turns the client's errors into ours."""
    try:
        yield
    except MessageSizeTooLargeError as error:
        raise InvalidError("event_too_large", "The record is larger than Kafka takes.") from error
    except _REFUSALS as error:
        raise RetryableError(
            f"Kafka refuses this principal ({error!r}): run python -m tessera.bus.make_acls", code="broker_unavailable"
        ) from error
    except (KafkaError, ConnectionError) as error:
        raise RetryableError(f"Kafka did not take the event: {error!r}", code="broker_unavailable") from error


def _label(topic: str) -> str:
    """A metric must not name a tenant."""
    base = topic.split(".", 1)[0]
    return base if base in ("ingest", "refused") else topic
