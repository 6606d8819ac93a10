"""Topics that every replica reads whole, outside groups: tables of declarations, commands to all."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from tessera.bus.codec import decode
from tessera.bus.events import Received
from tessera.bus.feeds import PartitionFeed
from tessera.bus.partitions import BACKOFF, PASSING
from tessera.bus.publisher import as_retryable
from tessera.bus.records import Record
from tessera.bus.settings import KafkaSettings
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import topic_of
from tessera.contracts.errors import InvalidError
from tessera.resilience import retrying
from tessera.telemetry import get_logger

_log = get_logger(__name__)


class Table:
    """Keeps a replica's own view of a topic up to date by calling `on_change` for each event, in order per partition.

    After a restart it reads from the beginning again; `on_change` must therefore be repeatable. An event that does not validate is
    passed over and logged: one bad declaration must not hide the others.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        client_id: str,
        event_class: type[EventData],
        on_change: Callable[[Received[Any]], Awaitable[None] | None],
        kafka_answers: Callable[[], Coroutine[Any, Any, None]],
        *,
        from_beginning: bool = True,
    ) -> None:
        self._kafka = kafka
        self.event_class = event_class
        self._topic = topic_of(event_class)
        self._on_change = on_change
        self._from_beginning = from_beginning
        self._caught_up = asyncio.Event()
        self._ends: dict[TopicPartition, int] = {}
        self._next: dict[TopicPartition, int] = {}
        self._progress = asyncio.Condition()
        partitions = tuple(range(self._topic.partitions))
        self._feed = PartitionFeed(
            kafka,
            client_id,
            self._topic.name,
            partitions,
            from_beginning=from_beginning,
            receive=self._receive,
            kafka_answers=kafka_answers,
        )

    async def start(self) -> None:
        """Begins to read."""
        await self._feed.start()
        self._ends = await retrying(BACKOFF, PASSING)(self._log_ends)
        await self._look(self._feed.consumer)

    async def _log_ends(self) -> dict[TopicPartition, int]:
        consumer = self._feed.consumer
        with as_retryable():
            return dict(await consumer.end_offsets(list(consumer.assignment())))

    def check_live(self) -> None:
        """Raises RetryableError when it no longer reads."""
        self._feed.check_live()

    async def stop(self) -> None:
        """Stops reading."""
        await self._feed.stop()

    @property
    def is_complete(self) -> bool:
        """Whether everything that was on the topic when the table started has been handed over."""
        return self._caught_up.is_set()

    async def caught_up(self) -> None:
        """Waits until everything that was on the topic when the table started has been handed over."""
        await self._caught_up.wait()

    async def up_to_date(self) -> None:
        """Waits until everything that is on the topic at the call has been handed over. For tables, not for feeds."""
        consumer = self._feed.consumer
        partitions = list(consumer.assignment())
        starts, ends = await asyncio.gather(consumer.beginning_offsets(partitions), consumer.end_offsets(partitions))
        async with self._progress:
            await self._progress.wait_for(
                lambda: all(self._next.get(partition, starts[partition]) >= end for partition, end in ends.items())
            )

    async def _receive(self, records: tuple[Record, ...]) -> None:
        for record in records:
            await self._hand_over(record)
            self._next[TopicPartition(record.topic, record.partition)] = record.offset + 1
        async with self._progress:
            self._progress.notify_all()
        await self._look(self._feed.consumer)

    async def _hand_over(self, record: Record) -> None:
        if not record.value:
            return
        try:
            event = decode(record, self._topic, self._topic.name)
        except InvalidError as error:
            _log.warning("event passed over", topic=self._topic.name, offset=record.offset, code=error.code)
            return
        if isinstance(event.data, self.event_class):
            await retrying(BACKOFF, _is_passing)(self._change, event)

    async def _change(self, event: Received[Any]) -> None:
        """Repeated while it fails for a passing reason; a bug is told and passed over, for the same reason as a bad event."""
        try:
            outcome = self._on_change(event)
            if inspect.isawaitable(outcome):
                await outcome
        except PASSING as error:
            _log.warning("change will be tried again", topic=event.topic, offset=event.offset, error=str(error))
            raise
        except Exception:  # noqa: BLE001
            _log.exception("change passed over", topic=event.topic, offset=event.offset)

    async def _look(self, consumer: AIOKafkaConsumer) -> None:
        if self._caught_up.is_set() or not self._ends:
            return
        positions = [(await consumer.position(partition), end) for partition, end in self._ends.items()] if self._from_beginning else []
        if all(position >= end for position, end in positions):
            self._caught_up.set()


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, PASSING)
