"""Where order does not matter an event that fails waits in retry topics, alone (docs/retries.md)."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tessera.bus import Bus, Received, Transaction
from tessera.bus.settings import ServiceSettings
from tessera.contracts.catalogue import RETRY_TOPICS, RetryTopic
from tessera.contracts.errors import FatalError, RetryableError
from tessera.contracts.events import GenerationCancelled
from tessera.storage import Database
from tessera.testkit import CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PATIENT = timedelta(seconds=30)
TENANT = {"tenantid": "acme"}
TOPIC = "generation.cancelled"
DEAD = f"{TOPIC}.generator.dlq"
RETRIES = [name for name, retry in RETRY_TOPICS.items() if retry.topic == TOPIC]
_EFFECT = text("INSERT INTO effect (tenant_id, event_id, content) VALUES (:tenant, :id, :content)")


class GeneratorSettings(ServiceSettings, service="generator"):
    """Nothing of its own."""


class Handler:
    """Leaves one effect; fails as often as a generation's id says: `<name>-<failures>`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.times: list[float] = []

    async def __call__(self, event: Received[GenerationCancelled], transaction: Transaction) -> None:
        name = event.data.generation_id
        self.calls[name] += 1
        if name.startswith("late"):
            self.times.append(time.monotonic())
        values = {"tenant": event.tenant_id, "id": event.id, "content": f"{event.topic}/{event.partition}/{event.offset}"}
        await transaction.connection.execute(_EFFECT, values)
        if self.calls[name] <= int(name.rpartition("-")[2]):
            raise RetryableError("not yet", code="busy")


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The topics keep their names; the waiting is shorter."""
    monkeypatch.setattr(RetryTopic, "delay", property(lambda retry: timedelta(seconds=0.3 * retry.attempt)))


@pytest.fixture
def generator(ground: Any, grounds_of: Callable[[str], Awaitable[None]], handler: Handler) -> Callable[..., Any]:
    """A running bus of the generator that only takes cancellations."""

    @asynccontextmanager
    async def run(instance: str = "one") -> AsyncIterator[Bus]:
        await grounds_of("generator")
        database = Database("generator", ground.postgres)
        fatal: list[FatalError] = []
        settings = GeneratorSettings(instance=instance, kafka=ground.kafka, postgres=ground.postgres)
        bus = Bus(settings, database, on_fatal=fatal.append)
        bus.consumer("chat").transactional(GenerationCancelled)(handler)
        await bus.connect()
        await bus.start()
        try:
            yield bus
        finally:
            await bus.drain()
            await bus.stop()
            await database.close()
        assert not fatal

    return run


async def cancel(producer: CloudEventProducer, name: str) -> Any:
    data = GenerationCancelled(generation_id=name, reason="client_request")
    return await producer.publish(TOPIC, data, id=name, key=b"one key", partition=0, **TENANT)


async def effects(ground: Any) -> list[str]:
    return [row["event_id"] for row in await ground.rows("SELECT event_id FROM generator.effect ORDER BY position")]


async def noted(ground: Any) -> list[tuple[str, str, str]]:
    return [tuple(row) for row in await ground.rows('SELECT topic, state, code FROM generator.parked ORDER BY "offset"')]


async def applied(ground: Any, *names: str) -> bool:
    assert sorted(await effects(ground)) == sorted(names)
    return True


@pytest.mark.usefixtures("hurry")
async def test_a_failing_event_waits_alone_and_its_identity_stays(
    ground: Any, generator: Any, producer: CloudEventProducer, *, handler: Handler, reader: Callable[..., Any]
) -> None:
    async with generator():
        written = await cancel(producer, "late-4")
        await cancel(producer, "free-0")
        await eventually(lambda: applied(ground, "free-0"), PATIENT)
        await eventually(lambda: _noted(ground, (TOPIC, "delayed", "busy")), PATIENT)
        await eventually(lambda: applied(ground, "free-0", "late-4"), PATIENT)
        await cancel(producer, "late-4")  # a producer's repeat
        await cancel(producer, "last-0")
        await eventually(lambda: applied(ground, "free-0", "late-4", "last-0"), PATIENT)
        first = (await reader(RETRIES[0]).read(1))[0]
    rows = await ground.rows("SELECT content FROM generator.effect WHERE event_id = 'late-4'")
    assert [row["content"] for row in rows] == [f"{TOPIC}/0/{written.offset}"]
    assert await noted(ground) == []
    assert first.id == "late-4"
    assert first.headers["tessera_retry_attempt"] == b"1"
    assert first.headers["tessera_retry_offset"] == str(written.offset).encode()


async def _noted(ground: Any, *rows: tuple[str, str, str]) -> bool:
    return await noted(ground) == list(rows)


async def test_a_step_that_came_to_another_body_when_it_was_repeated_is_a_repeat(
    ground: Any, generator: Any, producer: CloudEventProducer
) -> None:
    async with generator():
        await cancel(producer, "same-0")
        again = GenerationCancelled(generation_id="same-0", reason="deadline")
        await producer.publish(TOPIC, again, id="same-0", key=b"one key", partition=0, **TENANT)
        await cancel(producer, "last-0")
        await eventually(lambda: applied(ground, "same-0", "last-0"), PATIENT)
    assert await noted(ground) == []


@pytest.mark.usefixtures("hurry")
async def test_after_the_last_retry_topic_an_event_is_a_dead_letter_as_it_came(
    ground: Any, generator: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with generator():
        written = await cancel(producer, "never-1000")
        [letter] = await reader(DEAD).read(1, PATIENT)
        await eventually(lambda: _noted(ground, (TOPIC, "dead", "retries_exhausted")), PATIENT)
        delayed = await reader(*RETRIES).read(len(RETRIES))
    assert letter.headers["tessera_dead_letter_code"] == b"retries_exhausted"
    assert (letter.headers["tessera_dead_letter_topic"], letter.headers["tessera_dead_letter_offset"]) == (
        TOPIC.encode(),
        str(written.offset).encode(),
    )
    assert not [name for name in letter.headers if name.startswith("tessera_retry")]
    assert sorted(event.headers["tessera_retry_attempt"] for event in delayed) == [b"1", b"2", b"3"]
    assert await effects(ground) == []


@pytest.mark.usefixtures("hurry")
async def test_what_waits_is_taken_up_by_the_next_replica(ground: Any, generator: Any, producer: CloudEventProducer) -> None:
    async with generator():
        await cancel(producer, "late-4")
        await eventually(lambda: noted(ground), PATIENT)
    async with generator(instance="two"):
        await eventually(lambda: applied(ground, "late-4"), PATIENT)
    assert await noted(ground) == []


async def test_waiting_keeps_nobody_from_working(ground: Any, generator: Any, producer: CloudEventProducer, handler: Handler) -> None:
    """With the real delays: while one waits, others go on, and nothing looks stalled."""
    async with generator() as bus:
        await cancel(producer, "late-3")
        await eventually(lambda: noted(ground), PATIENT)
        for number in range(20):
            await cancel(producer, f"m{number}-0")
        await eventually(lambda: applied(ground, "late-3", *(f"m{number}-0" for number in range(20))), PATIENT)
        bus.check_live()
        bus.check_progress()
    assert handler.times[3] - handler.times[2] > 0.9, "it did not wait for a second"
