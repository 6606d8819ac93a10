"""A consumer stops although one of its fetches was about to be repeated."""

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer

from tessera.bus.stopping import stop_consumer
from tessera.testkit import Stack

pytestmark = pytest.mark.integration


async def _busy(stack: Stack) -> AIOKafkaConsumer:
    """A consumer with a fetch that ends as those do that wait to be repeated."""
    consumer = AIOKafkaConsumer(bootstrap_servers=stack.kafka_bootstrap_servers)
    await consumer.start()
    consumer._fetcher._pending_tasks.add(asyncio.create_task(asyncio.sleep(60)))
    return consumer


async def test_aiokafka_hands_its_own_cancellation_on(stack: Stack) -> None:
    """Once this fails, `stop_consumer` has done its service."""
    consumer = await _busy(stack)
    with pytest.raises(asyncio.CancelledError):
        await consumer.stop()
    await consumer._client.close()


async def test_a_consumer_is_stopped_whole(stack: Stack) -> None:
    consumer = await _busy(stack)
    await stop_consumer(consumer)
    assert not any(connection.connected() for connection in consumer._client._conns.values())
