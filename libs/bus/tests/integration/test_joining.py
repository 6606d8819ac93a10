"""Kafka breaks off while a bus starts: it waits, and works once Kafka is there. On a real broker, behind a proxy."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tessera.contracts.events import MessagePublished
from tessera.testkit import CloudEventProducer, eventually
from tessera.testkit.fault_proxy import FAIR, FaultProxy, Weather

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]


async def test_a_kafka_that_breaks_off_while_the_bus_starts_is_waited_for(
    ground: Any, new_bus: Callable[..., Any], producer: CloudEventProducer
) -> None:
    proxy = FaultProxy(int(ground.kafka.bootstrap_servers.rpartition(":")[2]))
    proxy.start()
    kafka = ground.kafka.model_copy(update={"bootstrap_servers": f"127.0.0.1:{proxy.port}", "request_timeout_seconds": 2.0})
    running = new_bus(kafka=kafka)
    try:
        await running.bus.connect()
        await asyncio.to_thread(proxy.turn, Weather(resets_after_bytes=0))  # whoever connects anew is thrown out
        starting = asyncio.create_task(running.bus.start())
        done, _ = await asyncio.wait({starting}, timeout=3)
        assert not done, starting
        await asyncio.to_thread(proxy.turn, FAIR)
        await asyncio.wait_for(starting, 30)
        data = MessagePublished(conversation_id="c", role="user", content="hello")
        await producer.publish("ingest", data, id="after", key=b"c", tenantid="acme")
        await eventually(lambda: ground.rows("SELECT 1 FROM memory.effect WHERE content = 'hello'"), timedelta(seconds=30))
        assert running.fatal == []
        await running.stop()
    finally:
        await asyncio.to_thread(proxy.stop)
