"""Dead letters on a real log: refused, shown, replayed, with one effect."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from types import ModuleType
from typing import Any

import pytest
from confluent_kafka import Producer

from tessera.bus import Bus, DeadLetter, DeadLetterSummary, LetterFilter
from tessera.bus.deadletters import dead_letter_topics
from tessera.testkit import CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TENANT = {"tenantid": "acme"}
TYPE = "tessera.message.published.v1"


def message(content: str) -> dict[str, str]:
    return {"conversation_id": "c", "role": "user", "content": content}


async def everything(letters: Sequence[DeadLetterSummary]) -> Sequence[DeadLetterSummary]:
    return letters


async def listed(bus: Bus, count: int, **wanted: Any) -> list[DeadLetterSummary]:
    """The oldest first, once there are `count`."""

    async def found() -> list[DeadLetterSummary] | None:
        page = await bus.dead_letters.page(LetterFilter(**wanted), limit=100, keep=everything, newest_first=False)
        assert page.next_cursor is None
        return page.letters if len(page.letters) >= count else None

    return await eventually(found)


async def whole(bus: Bus, letter: DeadLetterSummary) -> DeadLetter:
    async with aclosing(bus.dead_letters.letters([letter.id])) as found:
        (only,) = [letter async for _, letter in found]
    assert only is not None
    return only


async def effects(ground: Any) -> list[str]:
    return [row["event_id"] for row in await ground.rows("SELECT event_id FROM memory.effect ORDER BY position")]


async def inbox(ground: Any) -> int:
    return int((await ground.rows("SELECT count(*) FROM memory.inbox"))[0][0])


async def handled(ground: Any, producer: CloudEventProducer, name: str) -> None:
    """A good event behind all others: once it has its effect, they are handled."""
    await producer.publish("ingest", message(name), type=TYPE, id=name, key=b"c", partition=0, **TENANT)
    await eventually(lambda: _has_effect(ground, name))


async def _has_effect(ground: Any, name: str) -> bool:
    return name in await effects(ground)


async def test_a_refused_event_is_applied_once_however_often_it_is_replayed(
    ground: Any, running: Any, producer: CloudEventProducer, probe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as run:
        await producer.publish("ingest", message("invalid"), type=TYPE, id="m1", key=b"c", partition=0, **TENANT)
        (refused,) = await listed(run.bus, 1)
        assert (refused.code, refused.service, refused.attributes["id"], refused.replays) == ("not_wanted", "memory", "m1", 0)
        assert await inbox(ground) == 0, "what was refused is as if never seen"

        letter = await whole(run.bus, refused)
        await run.bus.replay(letter)
        again = (await listed(run.bus, 2))[1]
        assert (again.code, again.replays) == ("not_wanted", 1)

        async def no_trouble(content: str) -> None:
            """The cause is gone."""

        monkeypatch.setattr(probe, "_trouble", no_trouble)
        for one in (letter, letter, await whole(run.bus, again)):
            await run.bus.replay(one)
        await handled(ground, producer, "last")
    assert await effects(ground) == ["m1", "last"]
    assert await inbox(ground) == 2


async def test_replaying_an_event_that_pretends_to_be_another_leaves_that_one_alone(
    ground: Any, running: Any, producer: CloudEventProducer
) -> None:
    async with running() as run:
        for content in ("first", "second"):
            await producer.publish("ingest", message(content), type=TYPE, id="m1", key=b"c", partition=0, **TENANT)
        (refused,) = await listed(run.bus, 1)
        assert refused.code == "event_id_reused"
        await run.bus.replay(await whole(run.bus, refused))
        await listed(run.bus, 2)
        await producer.publish("ingest", message("first"), type=TYPE, id="m1", key=b"c", partition=0, **TENANT)
        await handled(ground, producer, "last")
        assert [letter.code for letter in await listed(run.bus, 2)] == ["event_id_reused"] * 2
    assert await effects(ground) == ["m1", "last"]


async def test_a_refused_event_beside_others_takes_only_its_own_entry_back(ground: Any, running: Any, producer: CloudEventProducer) -> None:
    for name, content in (("m1", "good"), ("m2", "invalid"), ("m3", "good")):
        await producer.publish("ingest", message(content), type=TYPE, id=name, key=b"c", partition=0, **TENANT)
    async with running():
        await handled(ground, producer, "m4")
    assert await effects(ground) == ["m1", "m3", "m4"]
    assert await inbox(ground) == 3


def fill(ground: Any, topic: str, count: int) -> None:
    """Letters as if a service had written them; confluent's client is faster than the bus. Blocks."""
    producer = Producer(
        {"bootstrap.servers": ground.kafka.bootstrap_servers, "enable.idempotence": True, "queue.buffering.max.messages": 200_000}
    )
    origin, _ = dead_letter_topics()[topic]
    for number in range(count):
        reason = {"code": "data_invalid", "topic": origin, "partition": "0", "offset": str(number), "time": "2026-01-01T12:00:00Z"}
        headers = [("ce_id", str(number)), *((f"tessera_dead_letter_{name}", value) for name, value in reason.items())]
        producer.produce(ground.kafka.physical(topic), b"{}" * 100, b"k", headers=headers)
        producer.poll(0)
    assert producer.flush(60) == 0


async def test_many_letters_on_several_topics_are_all_listed_once(ground: Any, running: Any) -> None:
    counts = {"ingest.memory.dlq": 5_000, "archive.requested.memory.dlq": 700}
    for topic, count in counts.items():
        await asyncio.to_thread(fill, ground, topic, count)
    async with running() as run:
        for newest_first in (True, False):
            found: list[DeadLetterSummary] = []
            cursor: str | None = None
            while cursor or not found:
                log = run.bus.dead_letters
                page = await log.page(LetterFilter(), limit=2_000, keep=everything, newest_first=newest_first, cursor=cursor)
                found, cursor = found + page.letters, page.next_cursor
            for topic, count in counts.items():
                offsets = [letter.place.offset for letter in found if letter.place.topic == topic]
                assert offsets == sorted(range(count), reverse=newest_first)


async def test_one_letter_among_many_is_found_by_its_id_and_by_its_events_id(ground: Any, running: Callable[..., Any]) -> None:
    await asyncio.to_thread(fill, ground, "ingest.memory.dlq", 3_000)
    async with running() as run:
        (found,) = await listed(run.bus, 1, event_id="1234")
        assert found.id == "ingest.memory.dlq:0:1234"
        assert (await whole(run.bus, found)).value == b"{}" * 100
        names = ["ingest.memory.dlq:0:3000", "ingest.memory.dlq:1:0", "ingest:0:0", "nothing", found.id]
        async with aclosing(run.bus.dead_letters.letters(names)) as letters:
            there = {name: letter is not None async for name, letter in letters}
    assert there == {**dict.fromkeys(names, False), found.id: True}


async def test_a_question_that_no_topic_can_answer_has_an_empty_page(running: Any) -> None:
    async with running() as run:
        for wanted in ({"topic": "ingest", "service": "generator"}, {"topic": "reply"}, {"topic": "sweep.requested"}):
            page = await run.bus.dead_letters.page(LetterFilter(**wanted), limit=1, keep=everything)
            assert (page.letters, page.next_cursor) == ([], None)
