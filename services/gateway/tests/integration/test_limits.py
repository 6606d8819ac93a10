"""Limits as counted in a real Redis, and as the official client meets them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import openai
import pytest
from redis.asyncio import Redis

from tessera.contracts import uuid7
from tessera.contracts.base import EventData
from tessera.contracts.events import GenerationCompleted, GenerationRequested, Usage
from tessera.gateway.adapters.counters import RedisCounters
from tessera.gateway.domain.limits import Holder, Window
from tessera.gateway.ports import Seat
from tessera.resilience import Breaker
from tessera.storage import RedisSettings, redis_client
from tessera.testkit import Stack, eventually, eventually_blocking

pytestmark = pytest.mark.integration

MINUTE = timedelta(minutes=1)
HELLO: Any = [{"role": "user", "content": "Hello"}]
NewCounters = Callable[[], RedisCounters]


def breaker() -> Breaker:
    return Breaker("redis", failure_threshold=3, reset_after=timedelta(minutes=5))


@pytest.fixture
async def replicas(stack: Stack) -> AsyncIterator[NewCounters]:
    """Makes counters, each with connections of its own."""
    opened: list[Redis] = []

    def make() -> RedisCounters:
        opened.append(redis_client(RedisSettings(url=stack.redis_url)))
        return RedisCounters(opened[-1], breaker())

    yield make
    for redis in opened:
        await redis.aclose()


def somebody() -> Holder:
    return Holder("user", f"t\x00 äöü:{{}} {uuid7().hex}")


async def test_replicas_share_a_window_and_no_one_gets_more_than_is_there(replicas: NewCounters) -> None:
    one, other = replicas(), replicas()
    window = Window(somebody(), "requests", 10)
    taken = await asyncio.gather(*(counters.take([window], 1) for counters in (one, other) * 20))
    assert sum(had for answer in taken for had in answer or ()) == 10
    (standing,) = await other.standings([window]) or ()
    assert standing.remaining == 0
    assert timedelta() < standing.reset_after <= MINUTE


async def test_holders_and_resources_are_counted_apart(replicas: NewCounters) -> None:
    counters = replicas()
    anna, bert = somebody(), somebody()
    windows = [Window(anna, "requests", 5), Window(anna, "tokens", 5), Window(bert, "requests", 5)]
    assert await counters.take(windows[:1], 4) == [True]
    assert await counters.take(windows, 2) == [False, True, True]
    assert [standing.remaining for standing in await counters.standings(windows) or ()] == [1, 3, 3]


async def test_a_step_counts_in_every_window_or_in_none(replicas: NewCounters) -> None:
    one, other = replicas(), replicas()
    roomy, narrow = Window(somebody(), "requests", 100), Window(somebody(), "requests", 10)
    stood = await asyncio.gather(*(counters.count([roomy, narrow], 1) for counters in (one, other) * 20))
    assert sum(min(standing.remaining for standing in answer or ()) >= 1 for answer in stood) == 10
    assert [standing.remaining for standing in await one.count([roomy, narrow], 1) or ()] == [90, 0]
    assert [standing.remaining for standing in await other.count([roomy], 101) or ()] == [90]
    assert [standing.remaining for standing in await other.standings([roomy]) or ()] == [90]


async def test_a_step_reckons_as_the_library_does(stack: Stack, replicas: NewCounters) -> None:
    redis, counters, window = redis_client(RedisSettings(url=stack.redis_url)), replicas(), Window(somebody(), "tokens", 1_017)
    await counters.count([window], 300)
    (current,) = [key async for key in redis.scan_iter(f"*{window.resource}*{window.limit}*")]
    await redis.pexpire(current, 45_000)  # the minute in which they were used ended 15 s ago
    (by_library,) = await counters.standings([window]) or ()
    (counted,) = await counters.count([window], 10) or ()
    assert counted.remaining == pytest.approx(by_library.remaining, abs=1) == pytest.approx(1_017 - 225, abs=2)
    assert abs(counted.reset_after - by_library.reset_after) < timedelta(milliseconds=200)
    (after,) = await counters.standings([window]) or ()
    assert after.remaining == pytest.approx(counted.remaining - 10, abs=1)
    await redis.aclose()


async def test_a_stream_takes_a_seat_of_each_or_none(replicas: NewCounters) -> None:
    one, other = replicas(), replicas()
    roomy, narrow = Seat(somebody(), 2), Seat(somebody(), 1)
    assert await one.enter([roomy, narrow], "first", MINUTE) is None
    assert await other.enter([roomy, narrow], "second", MINUTE) == narrow
    assert await other.enter([roomy], "third", MINUTE) is None
    assert await one.enter([roomy], "fourth", MINUTE) == roomy
    await one.leave([roomy, narrow], "first")
    await one.leave([roomy, narrow], "first")
    assert await other.enter([roomy, narrow], "second", MINUTE) is None


async def test_a_seat_whose_replica_died_is_free_after_the_longest_stream(replicas: NewCounters) -> None:
    counters, seat = replicas(), Seat(somebody(), 1)
    assert await counters.enter([seat], "lost", timedelta(seconds=0.3)) is None
    assert await counters.enter([seat], "next", MINUTE) == seat

    async def free() -> bool:
        return await counters.enter([seat], "next", MINUTE) is None

    await eventually(free)


async def test_a_redis_that_is_gone_answers_nothing_and_opens_the_breaker() -> None:
    guard = breaker()
    redis = redis_client(RedisSettings(url="redis://127.0.0.1:1/0"))
    counters, window = RedisCounters(redis, guard), Window(somebody(), "requests", 1)
    for _ in range(4):
        assert await counters.standings([window]) is None
        assert await counters.count([window], 1) is None
        assert await counters.enter([Seat(window.holder, 1)], "s", MINUTE) is None
        await counters.leave([Seat(window.holder, 1)], "s")
    assert guard.state == "open"
    await redis.aclose()


# --- through a running gateway --------------------------------------------------------------------------------------------


def answered(heard: Any) -> list[EventData]:
    usage = Usage(prompt_tokens=9, completion_tokens=3, source="counted")
    generation = heard.data["generation_id"]
    return [
        GenerationCompleted(
            generation_id=generation, attempt=1, last_index=-1, model_id="local/quote", text="a", finish_reason="stop", usage=usage
        )
    ]


async def used(stack: Stack, user: str, requests: int) -> None:
    """As if another replica had served them."""
    redis = redis_client(RedisSettings(url=stack.redis_url))
    window = Window(Holder("user", f"default\x00{user}"), "requests", 50)
    assert await RedisCounters(redis, breaker()).take([window], requests) == [True]
    await redis.aclose()


def test_the_sdk_raises_its_rate_limit_error_and_reads_the_headers(gateway: Any, stack: Stack) -> None:
    gateway.peer.on(GenerationRequested, answered)
    user = uuid7().hex
    asyncio.run(used(stack, user, 48))
    with gateway.openai() as client:
        for left in ("1", "0"):
            raw = client.chat.completions.with_raw_response.create(model="local/quote", messages=HELLO, user=user)
            assert (raw.headers["x-ratelimit-limit-requests"], raw.headers["x-ratelimit-remaining-requests"]) == ("50", left)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="local/quote", messages=HELLO, user=user)
        assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        client.chat.completions.create(model="local/quote", messages=HELLO, user=uuid7().hex)


def test_tokens_are_asked_for_in_advance(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answered)
    chat: dict[str, Any] = {"model": "local/quote", "messages": HELLO, "user": uuid7().hex, "max_completion_tokens": 900}
    with gateway.openai() as client:
        raw = client.chat.completions.with_raw_response.create(**chat)
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) <= 100
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**chat)
    assert refused.value.type == "tokens"


def test_one_stream_at_a_time_and_the_next_once_it_has_ended(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, lambda _: [])
    body: dict[str, Any] = {"model": "local/quote", "messages": HELLO, "user": uuid7().hex, "stream": True}
    with gateway.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as first:
            assert first.status_code == 200
            second = client.post("/v1/chat/completions", json=body)
            assert (second.status_code, second.json()["error"]["type"]) == (429, "streams")
            assert second.headers["retry-after"] == "1"
        gateway.peer.on(GenerationRequested, answered)
        eventually_blocking(lambda: client.post("/v1/chat/completions", json=body).status_code == 200)
