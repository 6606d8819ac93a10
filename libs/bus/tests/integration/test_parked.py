"""Where order matters an event that fails holds up its key and nothing else (docs/retries.md)."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from sqlalchemy import text

from tessera.bus import Bus, Received, Transaction
from tessera.bus.letters import LetterFilter
from tessera.bus.settings import HandlerSeconds, RetrySettings
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.contracts.events import MemoryRecorded, MessagePublished, ParkedDecision
from tessera.storage import StorageUnavailableError
from tessera.testkit import CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TENANT = {"tenantid": "acme"}
PATIENT = timedelta(seconds=30)
_EFFECT = text("INSERT INTO effect (tenant_id, event_id, content) VALUES (:tenant, :id, :content)")


def retrying(ground: Any, **options: Any) -> Any:
    """The same ground where parked events are retried at once rather than in minutes."""
    retry = RetrySettings(**{"initial_seconds": 0.02, "maximum_seconds": 0.2, **options})
    return replace(ground, kafka=ground.kafka.model_copy(update={"retry": retry}))


@pytest.fixture
def retry() -> dict[str, Any]:
    """Settings that a test gives by `with_retry`."""
    return {}


@pytest.fixture
def ground(ground: Any, retry: dict[str, Any]) -> Any:
    """With the test's settings for retries."""
    return retrying(ground, **retry)


def with_retry(**options: Any) -> pytest.MarkDecorator:
    """Settings for retries."""
    return pytest.mark.parametrize("retry", [options], ids=["retry"])


class Handler:
    """Leaves one effect and one event for each message; `before` may raise."""

    def __init__(self, before: Callable[[str], Awaitable[None] | None]) -> None:
        self.before = before
        self.calls: Counter[str] = Counter()

    async def __call__(self, event: Received[MessagePublished], transaction: Transaction) -> None:
        content = str(event.data.content)
        self.calls[content] += 1
        await transaction.connection.execute(_EFFECT, {"tenant": event.tenant_id, "id": event.id, "content": content})
        recorded = MemoryRecorded(
            memory_id=event.id,
            kind="message",
            origin_id=event.id,
            occurred_at=event.time,
            recorded_at=event.time,
            importance=0.5,
            text=content,
        )
        await transaction.publish(recorded, step="recorded", key=event.key)
        outcome = self.before(content)
        if outcome is not None:
            await outcome


@pytest.fixture
def handling(running: Any, probe: Any) -> Callable[..., Any]:
    """A running bus whose messages are handled by a handler."""

    def run(handler: Handler, **options: Any) -> Any:
        def register(bus: Bus) -> None:
            probe.register(bus, handler)

        return running(register=register, **options)

    return run


@pytest.fixture
def publish(producer: CloudEventProducer) -> Callable[..., Awaitable[Any]]:
    """Publishes a message under a key; all of a test on one partition."""

    async def send(key: str, content: str, event_id: str | None = None) -> Any:
        data = MessagePublished(conversation_id=key, role="user", content=content)
        return await producer.publish("ingest", data, id=event_id or content, key=key.encode(), partition=0, **TENANT)

    return send


async def effects(ground: Any) -> list[str]:
    return [row["content"] for row in await ground.rows("SELECT content FROM memory.effect ORDER BY position")]


async def parked(ground: Any) -> list[tuple[int, str, str]]:
    rows = await ground.rows('SELECT "offset", state, code FROM memory.parked ORDER BY "offset"')
    return [tuple(row) for row in rows]


async def applied(ground: Any, *contents: str) -> bool:
    assert sorted(await effects(ground)) == sorted(contents)
    return True


class Switch:
    """Lets messages through or not."""

    def __init__(self, *closed: str) -> None:
        self.closed = set(closed)

    def __call__(self, content: str) -> None:
        if content in self.closed:
            raise RetryableError("not yet", code="busy")


async def test_a_failing_event_holds_up_its_key_and_nothing_else(
    ground: Any, handling: Any, publish: Any, *, reader: Callable[..., Any]
) -> None:
    switch = Switch("first")
    handler = Handler(switch)
    await publish("k", "before")
    await publish("k", "first")
    await publish("k", "second")
    await publish("other", "free")
    async with handling(handler):
        await eventually(lambda: applied(ground, "before", "free"), PATIENT)
        await publish("k", "third")
        await eventually(lambda: handler.calls["first"] > 5, PATIENT)
        assert [row[1:] for row in await parked(ground)] == [("waiting", "busy"), ("waiting", "key_waits"), ("waiting", "key_waits")]
        assert handler.calls["second"] == 0 or await effects(ground) == ["before", "free"]
        switch.closed.clear()
        recorded = await reader("memory.recorded").read(5)
        await publish("k", "first")  # a producer's repeat
        await publish("k", "last")
        await eventually(lambda: applied(ground, "before", "free", "first", "second", "third", "last"), PATIENT)
    assert [content for content in await effects(ground) if content != "free"] == ["before", "first", "second", "third", "last"]
    texts = [event.data["text"] for event in recorded if event.key == b"k"]
    assert texts == ["before", "first", "second", "third"]
    assert await parked(ground) == []


async def test_a_parked_event_is_found_by_the_next_replica_with_its_bytes_and_headers(ground: Any, handling: Any, publish: Any) -> None:
    switch = Switch("first")
    await publish("k", "first")
    async with handling(Handler(switch)):
        await eventually(lambda: parked(ground), PATIENT)
    assert await effects(ground) == []
    switch.closed.clear()
    async with handling(Handler(switch), instance="two"):
        await eventually(lambda: applied(ground, "first"), PATIENT)
        [row] = await ground.rows("SELECT event_id FROM memory.effect")
    assert row["event_id"] == "first"


@with_retry(attempts=3)
@pytest.mark.parametrize("outcome", ["retry", "discard"])
async def test_after_its_last_attempt_an_event_is_stuck_until_an_operator_decides(
    ground: Any, handling: Any, publish: Any, *, outcome: Any, reader: Callable[..., Any]
) -> None:
    switch = Switch("first")
    written = await publish("k", "first")
    await publish("k", "second")
    async with handling(Handler(switch)) as run:
        consumer = run.bus.consumer("ingestion")
        await eventually(lambda: consumer.status().stuck, PATIENT)
        [event] = consumer.status().stuck
        assert (event.topic, event.partition, event.offset, event.code, event.attempts) == ("ingest", 0, written.offset, "busy", 3)
        assert consumer.status().parked == 2
        with pytest.raises(RetryableError, match="stuck"):
            run.bus.check_progress()
        assert [row[1] for row in await parked(ground)] == ["stuck", "waiting"]
        if outcome == "retry":
            switch.closed.clear()
        consumer.decide(ParkedDecision(topic="ingest", partition=0, offset=written.offset, outcome=outcome))
        await eventually(lambda: applied(ground, *(["first"] if outcome == "retry" else []), "second"), PATIENT)
        await eventually(lambda: consumer.status().parked is None)
        run.bus.check_progress()
        if outcome == "discard":
            [letter] = await reader("ingest.memory.dlq").read(1)
            assert letter.headers["tessera_dead_letter_code"] == b"parked_discarded"
            assert letter.data["content"] == "first"
    assert [row[1:] for row in await parked(ground)] == ([("dead", "parked_discarded")] if outcome == "discard" else [])


async def test_where_postgres_is_what_fails_nothing_is_parked_and_no_attempt_is_spent(ground: Any, handling: Any, publish: Any) -> None:
    away = [True]

    def before(content: str) -> None:
        if content == "first" and away[0]:
            raise StorageUnavailableError("Postgres cannot be reached")

    handler = Handler(before)
    await publish("k", "first")
    await publish("other", "free")
    async with handling(handler):
        await eventually(lambda: handler.calls["first"] > 5, PATIENT)
        assert await parked(ground) == []
        assert await effects(ground) == []
        away[0] = False
        await eventually(lambda: applied(ground, "first", "free"), PATIENT)


async def test_an_attempt_that_another_replica_overtook_has_no_effect(ground: Any, handling: Any, publish: Any) -> None:
    switch, waiting, go_on = Switch("first"), asyncio.Event(), asyncio.Event()

    async def slow(content: str) -> None:
        if not switch.closed and content == "first":
            waiting.set()
            await go_on.wait()

    def before(content: str) -> Awaitable[None]:
        switch(content)
        return slow(content)

    await publish("k", "first")
    async with handling(Handler(before)):
        await eventually(lambda: parked(ground), PATIENT)
        switch.closed.clear()
        await waiting.wait()
        # What the new owner of the partition would have done: applied it, row and all.
        await ground.rows("DELETE FROM memory.parked")
        go_on.set()
        await publish("k", "second")
        await eventually(lambda: applied(ground, "second"), PATIENT)
    assert await effects(ground) == ["second"]


@with_retry(parked_events=3)
async def test_beyond_the_limit_the_partition_waits_instead_of_filling_the_table(ground: Any, handling: Any, publish: Any) -> None:
    switch = Switch(*(f"m{number}" for number in range(8)))
    for number in range(8):
        await publish(f"k{number}", f"m{number}")
    async with handling(Handler(switch)) as run:
        await eventually(lambda: _count(ground, 3), PATIENT)
        await publish("other", "free")
        before = run.bus.consumer("ingestion").status().parked
        assert before == 3
        assert await effects(ground) == []
        switch.closed.clear()
        await eventually(lambda: applied(ground, "free", *(f"m{number}" for number in range(8))), PATIENT)
    assert await parked(ground) == []


async def _count(ground: Any, count: int) -> bool:
    return len(await parked(ground)) == count


@with_retry(handler_seconds=HandlerSeconds(ingestion=0.3))
async def test_a_handler_that_hangs_holds_nobody_up_for_long(
    ground: Any, handling: Any, publish: Any, *, reader: Callable[..., Any]
) -> None:
    async def before(content: str) -> None:
        if content == "hangs":
            await asyncio.Event().wait()

    await publish("k", "before")
    await publish("k", "hangs")
    await publish("k", "after")
    async with handling(Handler(before)):
        [letter] = await reader("ingest.memory.dlq").read(1, PATIENT)
        await eventually(lambda: applied(ground, "before", "after"), PATIENT)
    assert letter.headers["tessera_dead_letter_code"] == b"handler_failed"
    assert letter.id == "hangs"


async def test_a_slow_batch_is_committed_in_parts(ground: Any, handling: Any, publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.bus.calling.BUDGET", timedelta(milliseconds=50))
    longest: list[int] = []

    async def before(content: str) -> None:
        await asyncio.sleep(0.02)
        longest.append(len(await effects(ground)))

    for number in range(30):
        await publish("k", f"m{number:02}")
    async with handling(Handler(before)):
        await eventually(lambda: applied(ground, *(f"m{number:02}" for number in range(30))), PATIENT)
    assert await effects(ground) == [f"m{number:02}" for number in range(30)]
    assert any(0 < seen < 30 for seen in longest), "nothing was visible before the whole batch was done"


async def test_what_is_refused_leaves_a_row_without_its_content(
    ground: Any, handling: Any, publish: Any, producer: CloudEventProducer
) -> None:
    def before(content: str) -> None:
        if content == "unwanted":
            raise InvalidError("not_wanted", "This content is not wanted.", "content")

    await publish("k", "unwanted")
    await producer.publish("ingest", b"{no", type=MessagePublished.event_type, id="broken", key=b"k", partition=0, **TENANT)
    async with handling(Handler(before)):
        await eventually(lambda: _count(ground, 2), PATIENT)
    rows = await ground.rows(
        'SELECT tenant_id, identity IS NULL AS nameless, state, code, value, headers FROM memory.parked ORDER BY "offset"'
    )
    assert [tuple(row) for row in rows] == [
        ("acme", False, "refused", "not_wanted", None, None),
        (None, True, "refused", "data_malformed", None, None),
    ]


async def test_an_event_that_kills_its_retries_is_a_dead_letter_at_the_third_death(
    ground: Any, publish: Any, process: Any, reader: Callable[..., Any]
) -> None:
    quick = {"TESSERA__KAFKA__RETRY__INITIAL_SECONDS": "0.02", "TESSERA__KAFKA__RETRY__MAXIMUM_SECONDS": "0.1"}
    await publish("k", "late kill")
    await publish("k", "after")
    await process.start(**quick)
    for _ in range(3):
        assert await process.ended(timedelta(seconds=30)) == -9, process.log()
        await process.start(**quick)
    [letter] = await reader("ingest.memory.dlq").read(1, PATIENT)
    await eventually(lambda: applied(ground, "after"), PATIENT)
    assert letter.headers["tessera_dead_letter_code"] == b"consumer_crashed"


@pytest.mark.parametrize("seed", [1, 2])
async def test_each_key_keeps_its_order_whatever_fails(
    ground: Any, handling: Any, producer: CloudEventProducer, *, seed: int, reader: Callable[..., Any]
) -> None:
    """Random failures, several keys and partitions, two replicas one after the other: each effect once, each key in order."""
    chance = random.Random(seed)
    bugs: Counter[str] = Counter()

    def before(content: str) -> None:
        roll = chance.random()
        if roll < 0.35:
            raise RetryableError("by chance", code="busy")
        if roll < 0.4 and bugs[content] < 2:
            bugs[content] += 1
            raise KeyError("by chance")

    wanted: dict[str, list[str]] = defaultdict(list)
    for number in range(60):
        key = f"k{chance.randrange(6)}"
        wanted[key].append(f"{key}-{number:02}")
        data = MessagePublished(conversation_id=key, role="user", content=wanted[key][-1])
        await producer.publish("ingest", data, id=wanted[key][-1], key=key.encode(), partition=ord(key[1]) % 2, **TENANT)
    async with handling(Handler(before)):
        await eventually(lambda: _some(ground, 20), PATIENT)
    async with handling(Handler(before), instance="two"):
        await eventually(lambda: _some(ground, 60), timedelta(seconds=60))
        recorded = await reader("memory.recorded").until(lambda seen: len({event.id for event in seen}) >= 60, PATIENT)
    assert _by_key(await effects(ground)) == wanted
    told = {event.id: event.data["text"] for event in recorded}  # a relay that stops may tell one twice, with the same id
    assert _by_key(list(told.values())) == wanted


async def _some(ground: Any, count: int) -> bool:
    return len(await effects(ground)) >= count


def _by_key(contents: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for content in contents:
        found[content.split("-")[0]].append(content)
    return found


@with_retry(dead_letters_in_a_row=5)
async def test_a_producers_mistakes_halt_nobody(ground: Any, handling: Any, publish: Any, producer: CloudEventProducer) -> None:
    for number in range(12):
        await producer.publish("ingest", {"no": number}, type=MessagePublished.event_type, id=f"x{number}", partition=0, **TENANT)
    await publish("k", "last")
    async with handling(Handler(lambda _: None)) as run:
        await eventually(lambda: applied(ground, "last"), PATIENT)
        assert run.bus.consumer("ingestion").status().halted is None


@with_retry(dead_letters_in_a_row=5)
async def test_a_bad_deploy_stops_at_the_limit_and_goes_on_where_it_stopped(
    ground: Any, handling: Any, publish: Any, *, reader: Callable[..., Any]
) -> None:
    bad = [True]

    def before(content: str) -> None:
        if bad[0]:
            raise KeyError(content)

    for number in range(12):
        await publish("k", f"m{number:02}")
    async with handling(Handler(before)) as run:
        consumer = run.bus.consumer("ingestion")
        await eventually(lambda: consumer.status().halted, timedelta(seconds=60))
        letters = await reader("ingest.memory.dlq").read(5, PATIENT)
        [row] = await ground.rows("SELECT next_offset FROM memory.consumer_position WHERE topic = 'ingest' AND partition = 0")
        assert row["next_offset"] == 5
        bad[0] = False
        consumer.resume()
        await eventually(lambda: applied(ground, *(f"m{number:02}" for number in range(5, 12))), PATIENT)
    assert [letter.id for letter in letters] == [f"m{number:02}" for number in range(5)]


async def test_a_refused_event_that_is_replayed_and_applied_leaves_no_row(ground: Any, handling: Any, publish: Any) -> None:
    bad = [True]

    def before(content: str) -> None:
        if bad[0] and content == "first":
            raise InvalidError("not_wanted", "This content is not wanted.", "content")

    await publish("k", "first")
    async with handling(Handler(before)) as run:
        await eventually(lambda: _count(ground, 1), PATIENT)

        async def letters() -> Any:
            return (await run.bus.dead_letters.page(LetterFilter(), limit=10, keep=_everything)).letters

        [found] = await eventually(letters, PATIENT)
        bad[0] = False
        async with aclosing(run.bus.dead_letters.letters([found.id])) as whole:
            [(_, letter)] = [each async for each in whole]
        await run.bus.replay(letter)
        await eventually(lambda: applied(ground, "first"), PATIENT)
    assert await parked(ground) == []


async def _everything(letters: Any) -> Any:
    return letters


async def test_while_the_dead_letter_topic_is_away_the_outbox_waits_with_backoff_and_keeps_everything(
    ground: Any, handling: Any, publish: Any, *, reader: Callable[..., Any]
) -> None:
    name = ground.kafka.physical("ingest.memory.dlq")

    def before(content: str) -> None:
        if content == "bad":
            raise InvalidError("not_wanted", "This content is not wanted.", "content")

    async with handling(Handler(before)), _administrator(ground) as administrator:
        await administrator.delete_topics([name])
        await eventually(lambda: _is_gone(administrator, name), PATIENT)
        await publish("k", "bad")
        await publish("k", "good")
        await eventually(lambda: applied(ground, "good"), PATIENT)
        kept = await ground.rows("SELECT topic FROM memory.outbox ORDER BY id")
        assert "ingest.memory.dlq" in [row["topic"] for row in kept]
        await administrator.create_topics([NewTopic(name, 1, 1)])
        [letter] = await reader("ingest.memory.dlq").read(1, timedelta(seconds=60))
        [recorded] = await reader("memory.recorded").read(1, PATIENT)
    assert (letter.id, recorded.data["text"]) == ("bad", "good")
    assert await ground.rows("SELECT 1 FROM memory.outbox") == []


@asynccontextmanager
async def _administrator(ground: Any) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=ground.kafka.bootstrap_servers)
    try:
        await client.start()
        yield client
    finally:
        await client.close()


async def _is_gone(administrator: AIOKafkaAdminClient, topic: str) -> bool:
    return topic not in await administrator.list_topics()
