"""The process's one producer: acks=all, idempotent, no linger (facts: 5 ms of linger cost 5 ms per hop)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import RecordMetadata

from tessera.bus.codec import Encoded
from tessera.bus.events import Position
from tessera.bus.settings import KafkaSettings
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.telemetry import metrics

MAXIMUM_REQUEST_BYTES: Final = 2 * 1024 * 1024
"""Above our own limit of 900 KiB for data: a dead letter carries the original and the reason."""

_REFUSALS: Final = (ClusterAuthorizationFailedError, GroupAuthorizationFailedError, TopicAuthorizationFailedError)

Sent = asyncio.Future[RecordMetadata]


class Publisher:
    """Sends encoded events. Order holds per key; use it from one event loop."""

    def __init__(self, kafka: KafkaSettings, client_id: str) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connects; does nothing when connected. Raises RetryableError while no broker answers."""
        if self._producer is not None:
            return
        producer = AIOKafkaProducer(
            **self._kafka.connection(self._client_id),
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=128 * 1024,
            max_request_size=MAXIMUM_REQUEST_BYTES,
        )
        try:
            with as_retryable():
                await producer.start()
        except RetryableError:
            await producer.stop()
            raise
        self._producer = producer

    async def stop(self) -> None:
        """Sends what is buffered and disconnects."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()

    async def send(self, topic: str, encoded: Encoded, *, key: bytes | None = None, partition: int | None = None) -> Sent:
        """Hands a record over; the returned future is done when every in-sync replica has it. Waits only while the buffer is full.

        Raises RetryableError when Kafka does not answer, InvalidError `event_too_large` for a record above the producer's limit.
        """
        if self._producer is None:
            raise RetryableError("The producer is not running.", code="broker_unavailable")
        with as_retryable():
            sent: Sent = await self._producer.send(
                self._kafka.physical(topic), encoded.value, key=key, partition=partition, headers=encoded.headers
            )
        metrics.BUS_PUBLISHED.labels(topic=_label(topic)).inc()
        return sent

    async def publish(self, topic: str, encoded: Encoded, *, key: bytes | None = None, partition: int | None = None) -> Position:
        """Sends a record and waits for the acknowledgement of all in-sync replicas. Raises as `send` does."""
        return await acknowledged(topic, await self.send(topic, encoded, key=key, partition=partition))

    async def partitions(self, topic: str) -> frozenset[int]:
        """The partitions of a topic that exists. Raises RetryableError when Kafka does not answer."""
        if self._producer is None:
            raise RetryableError("The producer is not running.", code="broker_unavailable")
        with as_retryable():
            return frozenset(await self._producer.partitions_for(self._kafka.physical(topic)))

    async def ping(self) -> None:
        """Raises when no broker answers."""
        if self._producer is None:
            raise RetryableError("The producer is not running.", code="broker_unavailable")
        with as_retryable():
            answered = await self._producer.client.force_metadata_update()  # of what was published to: a cluster may have many topics
        if not answered:
            raise RetryableError("No broker answers.", code="broker_unavailable")


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
