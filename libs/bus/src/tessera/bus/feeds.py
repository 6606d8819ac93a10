"""Partitions read outside groups as long as the process lives: a client that got stuck is replaced, and reading goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Final

from aiokafka import TopicPartition

from tessera.bus.broker import Feed, PatientConsumer, Receive, end_stuck, partition_feed
from tessera.bus.partitions import BACKOFF, PASSING
from tessera.bus.publisher import as_retryable
from tessera.bus.records import Record
from tessera.bus.settings import KafkaSettings
from tessera.bus.watch import Watch
from tessera.resilience import retrying
from tessera.telemetry import get_logger

_PATIENCE: Final = timedelta(seconds=30)
_END_WITHIN: Final = timedelta(seconds=10)

_log = get_logger(__name__)


class PartitionFeed:
    """Hands over the records of these partitions of one topic, each once and in order per partition, batch after batch.

    While `receive` works on a batch, nothing further is read, and however long that takes, the feed does not count as stuck.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        client_id: str,
        topic: str,
        partitions: tuple[int, ...],
        *,
        from_beginning: bool,
        receive: Receive,
        kafka_answers: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._topic = topic
        self._partitions = partitions
        self._from_beginning = from_beginning
        self._receive = receive
        self._next: dict[TopicPartition, int] = {}
        self._receiving = False
        self._replacing = False
        self._feed = self._made()
        self._watch = Watch(
            topic,
            consumer=lambda: self.consumer,
            kafka_answers=kafka_answers,
            rejoin=self._replace,
            patience=_PATIENCE,
            busy=lambda: self._receiving,
        )

    @property
    def consumer(self) -> PatientConsumer:
        """The present consumer. Raises RetryableError `broker_unavailable` before the start."""
        return self._feed.consumer

    async def start(self) -> None:
        """Begins to read; returns once the place in each partition is known, however long Kafka is away."""
        await retrying(BACKOFF, PASSING)(self._begin)
        self._watch.start()

    async def _begin(self) -> None:
        """Raises RetryableError; then it has to be called again."""
        try:
            with as_retryable():
                await self._feed.start()
                for partition in self.consumer.assignment():
                    self._next.setdefault(partition, int(await self.consumer.position(partition)))
        except PASSING as error:
            _log.warning("waiting for Kafka", topic=self._topic, error=str(error))
            former, self._feed = self._feed, self._made()
            await end_stuck(former, _END_WITHIN)
            raise

    async def stop(self) -> None:
        """Stops reading."""
        await self._watch.stop()
        await self._feed.stop()

    def check_live(self) -> None:
        """Raises RetryableError when new clients did not help, again and again."""
        self._watch.check_live()

    def _made(self) -> Feed:
        async def receive(records: tuple[Record, ...]) -> None:
            # One that was replaced has nothing to say any more, and one that is new is not yet where it shall read.
            if self._feed is made and not self._replacing:
                await self._hand_over(records)

        made = partition_feed(
            self._kafka,
            self._client_id,
            self._topic,
            self._partitions,
            from_beginning=self._from_beginning,
            receive=receive,
        )
        return made

    async def _hand_over(self, records: tuple[Record, ...]) -> None:
        self._receiving = True
        try:
            await self._receive(records)
        finally:
            self._receiving = False
        self._next |= {TopicPartition(record.topic, record.partition): record.offset + 1 for record in records}

    async def _replace(self) -> None:
        """Raises RetryableError; then it has to be called again."""
        self._replacing = True
        former, self._feed = self._feed, self._made()
        await end_stuck(former, _END_WITHIN)
        with as_retryable():
            await self._feed.start()
        for partition, place in self._next.items():
            self.consumer.seek(partition, place)
        self._replacing = False
