"""How often an idle consumer asks, and how soon a partition is read that was left out. On a real broker."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiokafka import TopicPartition

from tessera.bus.broker import PatientBroker, PatientConsumer
from tessera.bus.codec import Encoded
from tessera.bus.publisher import Publisher
from tessera.bus.topics import TopicDirectory, Wanted

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]
TOPIC = "fetched"
IDLE_SECONDS = 5.0
NewConsumer = Callable[[], Awaitable[PatientConsumer]]


@pytest.fixture
async def publisher(ground: Any) -> AsyncIterator[Publisher]:
    directory = TopicDirectory(ground.kafka, "tests")
    await directory.start()
    await directory.ensure([Wanted(TOPIC, 2, {})])
    await directory.stop()
    made = Publisher(ground.kafka, "tests")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def consumer(ground: Any, publisher: Publisher) -> AsyncIterator[PatientConsumer]:
    kafka = ground.kafka.model_copy(update={"idle_fetch_wait_milliseconds": int(IDLE_SECONDS * 1000)})
    broker = PatientBroker(kafka, "tests")
    made = PatientConsumer(**broker._consumer_options, auto_offset_reset="earliest")
    await made.start()
    made.assign([TopicPartition(kafka.physical(TOPIC), number) for number in range(2)])
    yield made
    await made.stop()


async def read(consumer: PatientConsumer, count: int) -> list[tuple[int, str]]:
    """The partition and name of so many records."""
    found: list[tuple[int, str]] = []
    while len(found) < count:
        for records in (await consumer.getmany()).values():
            found += [(record.partition, record.headers[0][1].decode()) for record in records]
    return found


def named(name: str) -> Encoded:
    return Encoded([("ce_id", name.encode())], b"{}")


async def test_an_idle_consumer_asks_seldom_and_hears_at_once(consumer: PatientConsumer, publisher: Publisher) -> None:
    await publisher.publish(TOPIC, named("first"), partition=0)
    assert await read(consumer, 1) == [(0, "first")]
    asked: list[object] = []
    usual: Any = consumer._client.send

    def counted(node: int, request: Any, **options: Any) -> Any:
        asked.extend([request] if "Fetch" in type(request).__name__ else [])
        return usual(node, request, **options)

    consumer._client.send = counted
    waiting = asyncio.create_task(read(consumer, 1))
    await asyncio.wait({waiting}, timeout=2.0)
    assert len(asked) <= 2
    began = time.monotonic()
    await publisher.publish(TOPIC, named("second"), partition=1)
    assert await waiting == [(1, "second")]
    assert time.monotonic() - began < IDLE_SECONDS / 2


async def test_a_partition_that_was_left_out_is_read_soon_after_it_goes_on(consumer: PatientConsumer, publisher: Publisher) -> None:
    slow, other = sorted(consumer.assignment())
    await publisher.publish(TOPIC, named("a"), partition=slow.partition)
    assert await read(consumer, 1) == [(slow.partition, "a")]
    consumer.pause(slow)
    await publisher.publish(TOPIC, named("b"), partition=other.partition)
    assert await read(consumer, 1) == [(other.partition, "b")]  # the fetch that is under way now leaves `slow` out
    await publisher.publish(TOPIC, named("c"), partition=slow.partition)
    began = time.monotonic()
    consumer.resume(slow)
    assert await read(consumer, 1) == [(slow.partition, "c")]
    assert time.monotonic() - began < IDLE_SECONDS / 2
