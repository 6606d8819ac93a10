"""FastStream set up so that it loses nothing (rules of the log, 10).

It runs the consumers and gives the raw batches; committing, retrying and acknowledging are ours. The reasons: FastStream's own policies
commit on errors or commit all partitions at once, its decoding costs more than the whole rest, and an exception in a handler is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker
from faststream.kafka import TopicPartition as DeclaredPartition
from faststream.message import StreamMessage
from faststream.middlewares import AckPolicy

from tessera.bus.broken import tell_broken_connections
from tessera.bus.fetching import wait_long_while_idle
from tessera.bus.records import Record
from tessera.bus.settings import KafkaSettings
from tessera.bus.unreadable import read_every_header_name
from tessera.contracts.errors import RetryableError
from tessera.telemetry import get_logger

Receive = Callable[[tuple[Record, ...]], Awaitable[None]]
_POLL_SECONDS: Final = 1.0

_log = get_logger(__name__)

read_every_header_name()
tell_broken_connections()


class PatientConsumer(AIOKafkaConsumer):  # type: ignore[misc]
    """Waits for records itself: FastStream's batch loop sleeps as long as it waited whenever a poll came back empty."""

    def __init__(self, *, idle_fetch_wait_ms: int, **options: Any) -> None:
        super().__init__(**options)
        self._idle_fetch_wait_ms = idle_fetch_wait_ms
        self.turned_at = time.monotonic()
        """When a poll last came back, with records or without. It does not while partitions are being assigned anew."""

    async def start(self) -> None:
        """As in aiokafka."""
        await super().start()
        wait_long_while_idle(self, idle_milliseconds=self._idle_fetch_wait_ms)

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[Record]]:
        """As in aiokafka, waiting up to a second; returns at once when records are there."""
        patience = max(timeout_ms, int(_POLL_SECONDS * 1000))
        try:
            fetched: dict[TopicPartition, list[Record]] = await super().getmany(*partitions, timeout_ms=patience, max_records=max_records)
        except KafkaError as error:
            # FastStream waits five seconds and tries again, without a word.
            _log.warning("fetching failed, will be tried again", error=repr(error))
            raise
        self.turned_at = time.monotonic()
        return fetched


class PatientBroker(KafkaBroker):
    """A FastStream broker that only consumes, with PatientConsumers connected as our settings say."""

    def __init__(self, kafka: KafkaSettings, client_id: str, **options: Any) -> None:
        super().__init__(
            kafka.bootstrap_servers,
            apply_types=False,
            allow_auto_create_topics=False,
            consumer_only=True,
            logger=None,
            graceful_timeout=1.0,
        )
        self.client_id = client_id
        self._consumer_options = {
            **kafka.connection(client_id),
            "fetch_max_wait_ms": kafka.fetch_max_wait_milliseconds,
            "idle_fetch_wait_ms": kafka.idle_fetch_wait_milliseconds,
            **options,
        }

    async def _connect(self) -> Callable[..., AIOKafkaConsumer]:
        await super()._connect()
        self.config.broker_config.builder = self._consumer
        return self._consumer

    def _consumer(self, **options: Any) -> AIOKafkaConsumer:
        return PatientConsumer(**{**options, **self._consumer_options})


class Feed:
    """One running FastStream subscriber and its aiokafka consumer."""

    def __init__(self, broker: PatientBroker, subscriber: Any) -> None:
        self._broker = broker
        self._subscriber = subscriber

    @property
    def consumer(self) -> PatientConsumer:
        """The consumer. Raises RetryableError `broker_unavailable` before the start."""
        consumer: PatientConsumer | None = self._subscriber.consumer
        if consumer is None:
            raise RetryableError("The feed is not running yet.", code="broker_unavailable")
        return consumer

    async def start(self) -> None:
        """Connects and begins to hand over batches."""
        await self._broker.start()

    async def stop(self) -> None:
        """Ends fetching and leaves the group."""
        await self._broker.stop()


async def end_stuck(feed: Feed, within: timedelta) -> None:
    """Ends a feed whose client is stuck, as far as that goes, and closes its connections. Never raises, except when cancelled.

    A stuck client may hang in its stop, or leave it with the CancelledError of a task of its own.
    """
    consumer: PatientConsumer | None = feed._subscriber.consumer
    steps = [feed.stop, *([consumer._client.close] if consumer is not None else [])]
    for step in steps:
        ending = asyncio.create_task(step())
        await asyncio.wait({ending}, timeout=within.total_seconds())
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)


def group_feed(
    kafka: KafkaSettings,
    client_id: str,
    group: str,
    *,
    topics: tuple[str, ...],
    pattern: str | None,
    listener: ConsumerRebalanceListener,
    receive: Receive,
) -> Feed:
    """A feed in consumer group `group` over `topics` or `pattern` (names on the cluster)."""
    # Only a pattern has to look for new topics, and what it asks for is the metadata of the whole cluster.
    looking = {"metadata_max_age_ms": int(kafka.metadata_max_age_seconds * 1000)} if pattern else {}
    return _feed(
        PatientBroker(kafka, client_id, **looking),
        receive,
        topics,
        group_id=kafka.physical(group),
        pattern=pattern,
        listener=listener,
        auto_offset_reset="earliest",
        heartbeat_interval_ms=kafka.heartbeat_milliseconds,
        session_timeout_ms=int(kafka.session_timeout_seconds * 1000),
        rebalance_timeout_ms=int(kafka.rebalance_timeout_seconds * 1000),
        max_records=max(500, kafka.batch_records),
    )


def partition_feed(
    kafka: KafkaSettings,
    client_id: str,
    topic: str,
    partitions: tuple[int, ...],
    *,
    from_beginning: bool,
    receive: Receive,
) -> Feed:
    """A feed of exactly these partitions of one topic, outside groups."""
    return _feed(
        PatientBroker(kafka, client_id),
        receive,
        (),
        partitions=[DeclaredPartition(kafka.physical(topic), number) for number in partitions],
        auto_offset_reset="earliest" if from_beginning else "latest",
        max_records=500,
    )


def _feed(broker: PatientBroker, receive: Receive, topics: tuple[str, ...], **options: Any) -> Feed:
    subscriber: Any = broker.subscriber(
        *topics,
        batch=True,
        batch_timeout_ms=1,
        ack_policy=AckPolicy.MANUAL,
        parser=_unparsed,
        decoder=_undecoded,
        **options,
    )

    async def hand_over(message: StreamMessage[tuple[Record, ...]]) -> None:
        try:
            await receive(message.raw_message)
        except Exception:
            # FastStream would drop it without a word.
            _log.exception("a batch could not be handed over", client=broker.client_id, records=len(message.raw_message))
            raise

    subscriber(hand_over)
    return Feed(broker, subscriber)


async def _unparsed(records: tuple[Record, ...]) -> StreamMessage[tuple[Record, ...]]:
    """FastStream's own parser decodes every header and drops the whole batch, without a word, when one is no UTF-8."""
    return StreamMessage(raw_message=records, body=b"")


async def _undecoded(message: Any) -> Any:
    return message
