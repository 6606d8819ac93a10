"""One event of a keyed topic, found in the log itself: for whoever cannot wait until a consumer group has come to it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, TypeVar, cast

from aiokafka import AIOKafkaConsumer, TopicPartition

from tessera.bus.codec import decode
from tessera.bus.events import Received
from tessera.bus.publisher import Publisher, as_retryable, partition_of
from tessera.bus.records import Record
from tessera.bus.settings import KafkaSettings
from tessera.bus.stopping import stop_consumer
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import Topic, topic_of
from tessera.contracts.errors import InvalidError

D = TypeVar("D", bound=EventData)

_CLOCKS: Final = timedelta(seconds=5)
"""How far apart the clocks of producers and brokers may be."""


class Lookup:
    """Reads outside consumer groups, with a client of its own for each question."""

    def __init__(self, kafka: KafkaSettings, client_id: str, publisher: Publisher) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._publisher = publisher

    async def find(self, event_class: type[D], *, tenant_id: str, event_id: str, key: bytes, written_at: datetime) -> Received[D] | None:
        """The tenant's event with this id among those that were written at about `written_at` or later, up to the end as it is now.

        Takes as long as reading what lies between. Raises RetryableError when Kafka does not answer.
        """
        topic = topic_of(event_class)
        partition = partition_of(key, sorted(await self._publisher.partitions(topic.name)))
        target = TopicPartition(self._kafka.physical(topic.name), partition)
        consumer = AIOKafkaConsumer(**self._kafka.connection(self._client_id), fetch_max_wait_ms=self._kafka.fetch_max_wait_milliseconds)
        with as_retryable():
            await consumer.start()
        try:
            consumer.assign([target])
            with as_retryable():
                return await _search(consumer, target, topic, (tenant_id, event_id, event_class), written_at - _CLOCKS)
        finally:
            await stop_consumer(consumer)


async def _search(
    consumer: AIOKafkaConsumer, target: TopicPartition, topic: Topic, wanted: tuple[str, str, type[D]], since: datetime
) -> Received[D] | None:
    tenant_id, event_id, event_class = wanted
    (end,) = (await consumer.end_offsets([target])).values()
    (first,) = (await consumer.offsets_for_times({target: max(0, int(since.timestamp() * 1_000))})).values()
    if first is None:
        return None
    consumer.seek(target, first.offset)
    while await consumer.position(target) < end:
        for records in (await consumer.getmany(timeout_ms=1_000)).values():
            for record in records:
                event = _decoded(record, topic, event_id)
                if event is not None and event.tenant_id == tenant_id and isinstance(event.data, event_class):
                    return cast(Received[D], event)
    return None


def _decoded(record: Record, topic: Topic, event_id: str) -> Received[EventData] | None:
    """Only what has the id is looked into."""
    if ("ce_id", event_id.encode()) not in record.headers:
        return None
    try:
        return decode(record, topic, topic.name)
    except InvalidError:
        return None
