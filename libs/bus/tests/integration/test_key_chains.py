"""The mode idempotent where order matters: an event that fails holds up its key, not the partition (docs/retries.md)."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tessera.bus import Bus, Emitter, Received
from tessera.bus.settings import HandlerSeconds, RetrySettings, ServiceSettings
from tessera.contracts.errors import FatalError, InvalidError, RetryableError
from tessera.contracts.events import MemoryRecorded
from tessera.testkit import CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PATIENT = timedelta(seconds=30)
TENANT = {"tenantid": "acme"}
TOPIC = "memory.recorded"
DEAD = f"{TOPIC}.tokenizer.dlq"


class TokenizerSettings(ServiceSettings, service="tokenizer"):
    """Nothing of its own."""


class Handler:
    """Remembers what it applied, in order; `before` may raise."""

    def __init__(self, before: Callable[[str], Awaitable[None] | None]) -> None:
        self.before = before
        self.calls: Counter[str] = Counter()
        self.applied: list[str] = []

    async def __call__(self, event: Received[MemoryRecorded], emit: Emitter) -> None:
        name = event.data.memory_id
        self.calls[name] += 1
        outcome = self.before(name)
        if outcome is not None:
            await outcome
        self.applied.append(name)


@pytest.fixture
def tokenizer(ground: Any, grounds_of: Callable[[str], Awaitable[None]]) -> Callable[..., Any]:
    """A running bus of the tokenizer that only takes recorded memories."""

    @asynccontextmanager
    async def run(handler: Handler, instance: str = "one", **retry: Any) -> AsyncIterator[Bus]:
        await grounds_of("tokenizer")
        kafka = ground.kafka.model_copy(update={"retry": RetrySettings(**retry)})
        fatal: list[FatalError] = []
        bus = Bus(TokenizerSettings(instance=instance, kafka=kafka, postgres=ground.postgres), None, on_fatal=fatal.append)
        bus.consumer("ingestion").idempotent(MemoryRecorded)(handler)
        await bus.connect()
        await bus.start()
        try:
            yield bus
        finally:
            await bus.drain()
            await bus.stop()
        assert not fatal

    return run


async def record(producer: CloudEventProducer, key: str, name: str) -> Any:
    now = datetime.now(UTC)
    data = MemoryRecorded(memory_id=name, kind="message", origin_id=name, occurred_at=now, recorded_at=now, importance=0.5, text=name)
    return await producer.publish(TOPIC, data, id=name, key=key.encode(), partition=0, **TENANT)


async def committed(ground: Any) -> int:
    """The group's offset on partition 0."""
    client = AIOKafkaAdminClient(bootstrap_servers=ground.kafka.bootstrap_servers)
    await client.start()
    try:
        offsets = await client.list_consumer_group_offsets(ground.kafka.physical("tokenizer.ingestion"))
    finally:
        await client.close()
    return next((found.offset for place, found in offsets.items() if place.partition == 0 and place.topic.endswith(TOPIC)), 0)


async def test_a_failing_event_holds_up_its_key_and_the_offset_and_nothing_else(
    ground: Any, tokenizer: Any, producer: CloudEventProducer
) -> None:
    closed = {"a1"}

    def before(name: str) -> None:
        if name in closed:
            raise RetryableError("not yet", code="busy")

    handler = Handler(before)
    for key, name in [("a", "a0"), ("a", "a1"), ("b", "b0"), ("a", "a2"), ("b", "b1")]:
        await record(producer, key, name)
    async with tokenizer(handler) as bus:
        await eventually(lambda: {"a0", "b0", "b1"} == set(handler.applied), PATIENT)
        await eventually(lambda: committed(ground), PATIENT)
        assert await committed(ground) == 1
        consumer = bus.consumer("ingestion")
        assert consumer.status().parked == 2
        await eventually(lambda: consumer.status().stuck, PATIENT)
        assert consumer.status().stuck[0].code == "busy"
        closed.clear()
        await eventually(lambda: handler.applied[-2:] == ["a1", "a2"], PATIENT)
        await eventually(lambda: _is(ground, 5), PATIENT)
        assert consumer.status().stuck is None


async def _is_gone(client: AIOKafkaAdminClient, topic: str) -> bool:
    return topic not in await client.list_topics()


async def _is(ground: Any, offset: int) -> bool:
    return await committed(ground) == offset


async def test_no_more_is_taken_ahead_of_a_failing_event_than_the_bound(
    tokenizer: Any, producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.bus.stateless.AHEAD", 10)
    closed = {"a0"}

    def before(name: str) -> None:
        if name in closed:
            raise RetryableError("not yet")

    handler = Handler(before)
    await record(producer, "a", "a0")
    for number in range(30):
        await record(producer, "b", f"b{number}")
    async with tokenizer(handler):
        await eventually(lambda: len(handler.applied) >= 9, PATIENT)
        await eventually(lambda: handler.calls["a0"] > 4, PATIENT)
        assert len(handler.applied) == 9
        closed.clear()
        await eventually(lambda: len(handler.applied) == 31, PATIENT)


async def test_a_stop_leaves_what_waits_behind_a_failing_event_to_the_next_replica(tokenizer: Any, producer: CloudEventProducer) -> None:
    closed = {"a0"}

    def before(name: str) -> None:
        if name in closed:
            raise RetryableError("not yet")

    first, second = Handler(before), Handler(before)
    for key, name in [("a", "a0"), ("a", "a1"), ("b", "b0")]:
        await record(producer, key, name)
    async with tokenizer(first):
        await eventually(lambda: first.applied == ["b0"], PATIENT)
    assert first.applied == ["b0"]
    closed.clear()
    async with tokenizer(second, instance="two"):
        await eventually(lambda: len(second.applied) == 3, PATIENT)
    assert [name for name in second.applied if name.startswith("a")] == ["a0", "a1"]


@pytest.mark.parametrize("seed", [1, 2])
async def test_each_key_keeps_its_order_whatever_fails(tokenizer: Any, producer: CloudEventProducer, seed: int) -> None:
    chance, bugs = random.Random(seed), Counter[str]()

    async def before(name: str) -> None:
        roll = chance.random()
        await asyncio.sleep(0.01 * roll)
        if roll < 0.3:
            raise RetryableError("by chance")
        if roll < 0.35 and bugs[name] < 2:
            bugs[name] += 1
            raise KeyError("by chance")

    wanted: dict[str, list[str]] = defaultdict(list)
    for number in range(60):
        key = f"k{chance.randrange(6)}"
        wanted[key].append(f"{key}-{number:02}")
        await record(producer, key, wanted[key][-1])
    handler = Handler(before)
    async with tokenizer(handler):
        await eventually(lambda: len(handler.applied) >= 60, timedelta(seconds=60))
    found: dict[str, list[str]] = defaultdict(list)
    for name in handler.applied:
        found[name.split("-")[0]].append(name)
    assert found == wanted


async def test_a_handler_that_hangs_is_a_dead_letter_and_the_next_of_its_key_goes_on(
    tokenizer: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async def before(name: str) -> None:
        if name == "a0":
            await asyncio.Event().wait()

    handler = Handler(before)
    for key, name in [("a", "a0"), ("a", "a1"), ("b", "b0")]:
        await record(producer, key, name)
    async with tokenizer(handler, handler_seconds=HandlerSeconds(ingestion=0.3)):
        [letter] = await reader(DEAD).read(1, PATIENT)
        await eventually(lambda: sorted(handler.applied) == ["a1", "b0"], PATIENT)
    assert letter.headers["tessera_dead_letter_code"] == b"handler_failed"


async def test_only_dead_letters_halt_the_consumer_until_an_operator_resumes_it(
    tokenizer: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    bad = [True]

    def before(name: str) -> None:
        if bad[0]:
            raise InvalidError("deploy_broken", "Nothing is right any more.")

    handler = Handler(before)
    for number in range(40):
        await record(producer, "a", f"m{number:02}")
    async with tokenizer(handler, dead_letters_in_a_row=5) as bus:
        consumer = bus.consumer("ingestion")
        await eventually(lambda: consumer.status().halted, PATIENT)
        assert consumer.status().state == "paused"
        with pytest.raises(RetryableError, match="halted"):
            bus.check_progress()
        bus.check_live()
        letters = await reader(DEAD).read(5, PATIENT)
        assert len(handler.calls) <= 6, "it went on after it was halted"
        assert {letter.headers["tessera_dead_letter_code"] for letter in letters} == {b"deploy_broken"}
        bad[0] = False
        consumer.resume()
        await eventually(lambda: len(handler.calls) == 40, PATIENT)
        assert consumer.status().halted is None
        bus.check_progress()
    assert len(handler.applied) >= 34


async def test_without_its_dead_letter_topic_an_event_waits_with_backoff_and_nothing_is_lost(
    ground: Any, tokenizer: Any, producer: CloudEventProducer, *, reader: Callable[..., Any]
) -> None:
    def before(name: str) -> None:
        if name == "a0":
            raise InvalidError("not_wanted", "no")

    handler = Handler(before)
    async with tokenizer(handler):
        client = AIOKafkaAdminClient(bootstrap_servers=ground.kafka.bootstrap_servers)
        await client.start()
        await client.delete_topics([ground.kafka.physical(DEAD)])
        await eventually(lambda: _is_gone(client, ground.kafka.physical(DEAD)), PATIENT)
        await client.close()
        await record(producer, "a", "a0")
        await record(producer, "b", "b0")
        await eventually(lambda: handler.applied == ["b0"], PATIENT)
        await eventually(lambda: handler.calls["a0"] >= 2, timedelta(seconds=60))
        assert handler.calls["a0"] < 20, "a hot loop"
        await make_again(ground)
        [letter] = await reader(DEAD).read(1, timedelta(seconds=60))
    assert letter.id == "a0"


async def make_again(ground: Any) -> None:
    """Makes the topic again."""
    client = AIOKafkaAdminClient(bootstrap_servers=ground.kafka.bootstrap_servers)
    await client.start()
    await client.create_topics([NewTopic(ground.kafka.physical(DEAD), 1, 1)])
    await client.close()
