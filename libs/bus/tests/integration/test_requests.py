"""Requests, replies and streams on a real Kafka."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tessera.bus import RequestFailedError, StreamExpiredError, TimedOutError
from tessera.contracts.events import GenerationChunk, RecallCompleted, RecallRequested, RequestFailed
from tessera.contracts.ids import uuid7
from tessera.testkit import CloudEventProducer, eventually

pytestmark = pytest.mark.integration

TENANT = {"tenantid": "acme"}


async def ask(run: Any, query: str, **options: Any) -> Any:
    requests = run.bus.requests
    request = RecallRequested(query=query, reply_partition=requests.reply_partition)
    return await requests.ask(request, **{"tenant_id": "acme", "request_id": "r1", "timeout": timedelta(seconds=10), **options})


@pytest.fixture
def with_requests(running: Any, probe: Any) -> Callable[..., Any]:
    def register(bus: Any) -> None:
        probe.register(bus)
        assert bus.requests.partitions

    return lambda **options: running(register=register, **options)


async def test_a_request_is_answered(with_requests: Any) -> None:
    async with with_requests() as run:
        assert await ask(run, "hello") == RecallCompleted(memories=())


async def test_many_requests_at_once_get_their_own_answers(with_requests: Any) -> None:
    async with with_requests() as run:
        answers = await asyncio.gather(*(ask(run, f"q{number}") for number in range(100)))
        assert len(answers) == 100
        committed = await eventually(lambda: _committed(run, "recall.requested", 100))
    assert committed == 100


async def _committed(run: Any, topic: str, total: int) -> int:
    consumer = run.bus.consumer("chat")._joined.consumer
    found = [await consumer.committed(partition) or 0 for partition in consumer.assignment() if partition.topic.endswith(topic)]
    return sum(found) if sum(found) >= total else 0


@pytest.mark.parametrize(("query", "code", "param"), [("invalid", "query_unwanted", "query"), ("bug", "handler_failed", None)])
async def test_a_failure_is_an_answer_too(query: str, code: str, param: str | None, with_requests: Any) -> None:
    async with with_requests() as run:
        with pytest.raises(RequestFailedError) as failed:
            await ask(run, query)
    assert (failed.value.problem.code, failed.value.problem.param) == (code, param)


async def test_a_dependency_that_stays_away_is_told_at_the_deadline(with_requests: Any, reader: Callable[..., Any]) -> None:
    async with with_requests() as run:
        with pytest.raises(TimedOutError):
            await ask(run, "busy", timeout=0.5)
        [reply] = await reader("reply").of_type(RequestFailed.event_type)
    assert reply.data["problem"]["code"] == "dependency_unavailable"


async def test_an_expired_request_has_no_effect_and_is_answered_so(
    with_requests: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with with_requests():
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        await producer.publish("recall.requested", RecallRequested(query="q", reply_partition=5), id="q1", deadline=past, **TENANT)
        [reply] = await reader("reply").read(1)
    assert reply.data["problem"]["code"] == "expired"
    assert reply.partition == 5


async def test_a_request_that_does_not_validate_is_answered_where_its_asker_listens(
    with_requests: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with with_requests():
        await producer.publish("recall.requested", {"query": "", "reply_partition": 7}, type=RecallRequested.event_type, id="q1", **TENANT)
        await producer.publish("recall.requested", {"query": ""}, type=RecallRequested.event_type, id="q2", **TENANT)
        [reply] = await reader("reply").read(1)
        [letter] = await reader("recall.requested.memory.dlq").read(1)
    assert (reply.partition, reply.data["problem"]["code"], reply.data["problem"]["param"]) == (7, "data_invalid", "query")
    assert (letter.id, letter.headers["tessera_dead_letter_code"]) == ("q2", b"data_invalid")


def chunk(generation: str, index: int) -> GenerationChunk:
    return GenerationChunk(generation_id=generation, attempt=1, index=index, text_offset=index, text=str(index))


async def test_a_stream_gives_its_own_replies_and_can_be_resumed_elsewhere(with_requests: Any) -> None:
    async with with_requests() as run:
        requests, generation = run.bus.requests, str(uuid7())
        partition = requests.reply_partition
        async with requests.stream(generation) as replies:
            for index in range(4):
                await run.bus.publish(chunk(generation, index), tenant_id="acme", partition=partition)
                await run.bus.publish(chunk("another", index), tenant_id="acme", partition=partition)
            seen = [await anext(replies) for _ in range(4)]
        assert [reply.data.index for reply in seen] == [0, 1, 2, 3]
        async with requests.stream(generation, after=(partition, seen[1].offset)) as replies:
            assert [(await anext(replies)).data.index for _ in range(2)] == [2, 3]
        with pytest.raises(StreamExpiredError):
            async with requests.stream(generation, after=(partition, 10_000)):
                pass
