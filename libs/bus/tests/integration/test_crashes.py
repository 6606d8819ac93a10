"""The process is killed at each named point; the effect still happens once and nothing is lost."""

import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest

from tessera.bus import faults
from tessera.contracts.events import MessagePublished, RecallRequested
from tessera.testkit import CloudEvent, CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

COUNT = 20
TENANT = {"tenantid": "acme"}


async def publish_messages(producer: CloudEventProducer, contents: Sequence[str]) -> None:
    for number, content in enumerate(contents):
        data = MessagePublished(conversation_id="c", role="user", content=content)
        await producer.publish("ingest", data, id=f"m{number}", partition=number % 2, **TENANT)


async def effects(ground: Any) -> list[str]:
    return sorted(row["event_id"] for row in await ground.rows("SELECT event_id FROM memory.effect"))


def distinct(count: int) -> Callable[[Sequence[CloudEvent]], bool]:
    return lambda seen: len({event.id for event in seen}) >= count


@pytest.mark.parametrize("point", [faults.CONSUMED_BEFORE_COMMIT, faults.COMMITTED_BEFORE_OFFSET, faults.RELAY_PUBLISHED_BEFORE_DELETE])
async def test_the_effect_happens_once_whatever_point_the_kill_hits(
    point: str, ground: Any, producer: CloudEventProducer, reader: Callable[..., Any], process: Any
) -> None:
    await publish_messages(producer, ["hello"] * COUNT)
    await process.start(TESSERA__CRASH_POINT=point)
    assert await process.ended() == -signal.SIGKILL, process.log()
    await process.start()
    recorded = await reader("memory.recorded").until(distinct(COUNT), timedelta(seconds=30))
    await eventually(lambda: _empty(ground, "outbox"))
    process.tell(signal.SIGTERM)
    assert await process.ended() == 0, process.log()
    assert await effects(ground) == sorted(f"m{number}" for number in range(COUNT))
    assert len({event.id for event in recorded}) == COUNT
    assert point != faults.CONSUMED_BEFORE_COMMIT or "a batch died before its commit" in process.log()
    assert await _empty(ground, "batch_mark")


async def _empty(ground: Any, table: str) -> bool:
    return await ground.rows(f"SELECT 1 FROM memory.{table}") == []


async def test_an_event_that_kills_the_process_goes_to_the_dead_letters_at_the_third_death(
    ground: Any, producer: CloudEventProducer, reader: Callable[..., Any], process: Any
) -> None:
    await publish_messages(producer, ["one", "x", "kill", "y", "two", "z"])
    deaths = 0
    await process.start()
    for _ in range(3):
        assert await process.ended() == -signal.SIGKILL, process.log()
        deaths += 1
        await process.start()
    [letter] = await reader("ingest.memory.dlq").read(1, timedelta(seconds=20))
    [refused] = await reader("refused").read(1)
    await eventually(lambda: _all_but_the_killer(ground))
    assert deaths == 3
    assert letter.headers["tessera_dead_letter_code"] == b"consumer_crashed"
    assert letter.headers["tessera_dead_letter_attempts"] == b"3"
    assert letter.data["content"] == "kill"
    assert refused.data["reason"]["code"] == "consumer_crashed"


async def _all_but_the_killer(ground: Any) -> bool:
    return await effects(ground) == ["m0", "m1", "m3", "m4", "m5"]


async def test_a_request_is_answered_again_when_the_kill_came_before_its_offset(
    producer: CloudEventProducer, reader: Callable[..., Any], process: Any
) -> None:
    await producer.publish("recall.requested", RecallRequested(query="q", reply_partition=3), id="q1", **TENANT)
    await process.start(TESSERA__CRASH_POINT=faults.EMITTED_BEFORE_OFFSET)
    assert await process.ended() == -signal.SIGKILL, process.log()
    await process.start()
    replies = await reader("reply").read(2, timedelta(seconds=20))
    assert replies[0].id == replies[1].id
    assert {reply.partition for reply in replies} == {3}
    assert {reply.attributes["correlationid"] for reply in replies} == {"q1"}


async def test_a_stop_finishes_what_is_in_hand_before_it_leaves(ground: Any, producer: CloudEventProducer, process: Any) -> None:
    await process.start()
    await eventually(lambda: "service started" in process.log(), timeout=20)
    await publish_messages(producer, ["slow1.5"])
    await eventually(lambda: _marked(ground))
    process.tell(signal.SIGTERM)
    assert await process.ended() == 0, process.log()
    assert await effects(ground) == ["m0"]
    assert await _empty(ground, "batch_mark")
    assert await _empty(ground, "outbox")


async def _marked(ground: Any) -> bool:
    return not await _empty(ground, "batch_mark")


async def test_a_fatal_error_stops_the_service_with_its_reason(producer: CloudEventProducer, process: Any) -> None:
    await publish_messages(producer, ["fatal"])
    await process.start()
    assert await process.ended() == 1
    assert "asked to stop" in process.log()
