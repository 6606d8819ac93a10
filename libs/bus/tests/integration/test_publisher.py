"""What a record costs that the broker refuses: itself, never the partition, and never the order of what follows. On a real broker."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from tessera.bus.codec import Encoded
from tessera.bus.outbox import OutboxRow, write
from tessera.bus.publisher import Publisher, acknowledged
from tessera.bus.topics import TopicDirectory, Wanted
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.contracts.ids import uuid7
from tessera.storage import Database
from tessera.testkit import eventually

pytestmark = pytest.mark.integration

TOPIC = "narrow"
LIMIT = 2_000


@pytest.fixture
async def publisher(ground: Any) -> AsyncIterator[Publisher]:
    """A producer, and a topic of one partition that refuses batches above LIMIT bytes."""
    directory = TopicDirectory(ground.kafka, "tests")
    await directory.start()
    await directory.ensure([Wanted(TOPIC, 1, {"max.message.bytes": str(LIMIT)})])
    await directory.stop()
    made = Publisher(ground.kafka, "tests")
    await made.start()
    yield made
    await made.stop()


def small(name: str) -> Encoded:
    return Encoded([("ce_id", name.encode())], b"{}")


def large(name: str) -> Encoded:
    return Encoded([("ce_id", name.encode())], b"x" * (2 * LIMIT))


async def test_a_refused_record_does_not_close_the_partition(publisher: Publisher, reader: Callable[..., Any]) -> None:
    await publisher.publish(TOPIC, small("a"))
    with pytest.raises(InvalidError, match="larger"):
        await publisher.publish(TOPIC, large("b"))
    await publisher.publish(TOPIC, small("c"))
    await publisher.publish(TOPIC, small("d"))
    assert [event.id for event in await reader(TOPIC).read(3)] == ["a", "c", "d"]


async def test_nothing_that_was_handed_over_later_overtakes_a_refused_record(publisher: Publisher, reader: Callable[..., Any]) -> None:
    await publisher.publish(TOPIC, small("a"))
    refused = await publisher.send(TOPIC, large("b"))
    later = [asyncio.create_task(publisher.publish(TOPIC, small(f"later-{number}"))) for number in range(20)]
    with pytest.raises(InvalidError):
        await acknowledged(TOPIC, refused)
    outcomes = await asyncio.gather(*later, return_exceptions=True)
    failed = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, RetryableError | InvalidError)]
    assert failed == list(range(len(failed))), "one that was handed over later came through, an earlier one did not"
    await publisher.publish(TOPIC, small("end"))
    found = [event.id for event in await reader(TOPIC).read(2 + 20 - len(failed))]
    assert found == ["a", *(f"later-{number}" for number in range(len(failed), 20)), "end"]


async def test_a_gap_in_one_partition_fails_what_waits_in_others_and_all_of_it_can_be_sent_again(
    ground: Any, publisher: Publisher, reader: Callable[..., Any]
) -> None:
    await publisher.publish("memory.recorded", small("a"), key=b"k")
    sent = [await publisher.send(TOPIC, large("refused")), await publisher.send("memory.recorded", small("b"), key=b"k")]
    outcomes = await asyncio.gather(*(acknowledged("either", one) for one in sent), return_exceptions=True)
    assert isinstance(outcomes[0], InvalidError)
    if isinstance(outcomes[1], BaseException):
        assert isinstance(outcomes[1], RetryableError)
        await publisher.publish("memory.recorded", small("b"), key=b"k")
    assert [event.id for event in await reader("memory.recorded").read(2)] == ["a", "b"]


async def test_the_relay_publishes_the_rest_and_keeps_the_order_behind_a_row_that_is_refused(
    ground: Any, running: Any, publisher: Publisher, database: Database, reader: Callable[..., Any]
) -> None:
    rows = [
        *(OutboxRow(uuid7(), TOPIC, b"k", small(f"before-{number}")) for number in range(3)),
        OutboxRow(uuid7(), TOPIC, b"k", large("refused")),
        *(OutboxRow(uuid7(), TOPIC, b"k", small(f"behind-{number}")) for number in range(3)),
        *(OutboxRow(uuid7(), "memory.recorded", f"k{number}".encode(), small(f"else-{number}")) for number in range(50)),
    ]
    async with running():
        # Each in a transaction of its own: rows of one batch are refused together.
        for row in rows:
            async with database.transaction() as connection:
                await write(connection, [row])
        assert {event.id for event in await reader("memory.recorded").read(50)} == {f"else-{number}" for number in range(50)}
        await _widen(ground)
        await eventually(lambda: _is_empty(ground), timeout=timedelta(seconds=60))
    found = list(dict.fromkeys([event.id for event in await reader(TOPIC).read(7)]))
    assert found == ["before-0", "before-1", "before-2", "refused", "behind-0", "behind-1", "behind-2"]


async def _widen(ground: Any) -> None:
    client = AIOKafkaAdminClient(bootstrap_servers=ground.kafka.bootstrap_servers)
    await client.start()
    await client.alter_configs(
        [ConfigResource(ConfigResourceType.TOPIC, ground.kafka.physical(TOPIC), configs={"max.message.bytes": "1000000"})]
    )
    await client.close()


async def _is_empty(ground: Any) -> bool:
    return not await ground.rows("SELECT 1 FROM memory.outbox LIMIT 1")
