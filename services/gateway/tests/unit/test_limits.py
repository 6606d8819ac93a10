"""Limits: what is counted, what is refused, and what the client is told."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tessera.contracts.events import EmbeddingCompleted
from tessera.gateway.domain import limits
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.keys import Principal
from tessera.gateway.domain.limits import Allowance, Holder, Standing, Window
from tessera.gateway.handlers.limiting import Gate, Use
from tessera.gateway.ports import Seat, Tenant

pytestmark = pytest.mark.unit

KEY, TENANT = Holder("key", "k"), Holder("tenant", "t")
MINUTE = timedelta(minutes=1)
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "x"}]}


@dataclass
class MemoryCounters:
    """`ports.Counters` in memory; its minute never ends."""

    used: Counter[tuple[Holder, str]] = field(default_factory=Counter)
    seats: set[tuple[Holder, str]] = field(default_factory=set)
    away: bool = False

    async def standings(self, windows: Sequence[Window]) -> Sequence[Standing] | None:
        if self.away:
            return None
        return [Standing(each, each.limit - self.used[each.holder, each.resource], timedelta(seconds=2)) for each in windows]

    async def count(self, windows: Sequence[Window], cost: int) -> Sequence[Standing] | None:
        standings = await self.standings(windows)
        if standings and all(each.remaining >= cost for each in standings):
            await self.take(windows, cost)
        return standings

    async def take(self, windows: Sequence[Window], cost: int) -> Sequence[bool] | None:
        if self.away:
            return None
        taken = []
        for each in windows:
            room = each.limit - self.used[each.holder, each.resource] >= cost
            self.used[each.holder, each.resource] += cost * room
            taken.append(room)
        return taken

    async def enter(self, seats: Sequence[Seat], stream_id: str, longest: timedelta) -> Seat | None:
        full = next((seat for seat in seats if sum(holder == seat.holder for holder, _ in self.seats) >= seat.limit), None)
        if full is None:
            self.seats |= {(seat.holder, stream_id) for seat in seats}
        return full

    async def leave(self, seats: Sequence[Seat], stream_id: str) -> None:
        self.seats -= {(seat.holder, stream_id) for seat in seats}


def gate(counters: MemoryCounters, **allowances: Allowance) -> Gate:
    return Gate(counters, allowances)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (timedelta(), "0s"),
        (timedelta(microseconds=1), "1ms"),
        (timedelta(milliseconds=120), "120ms"),
        (timedelta(seconds=1), "1s"),
        (timedelta(seconds=1.5), "1.5s"),
        (timedelta(seconds=60), "1m0s"),
        (timedelta(seconds=62), "1m2s"),
        (timedelta(seconds=-3), "0s"),
    ],
)
def test_durations_are_written_as_the_live_api_does(value: timedelta, written: str) -> None:
    assert limits.duration(value) == written


def test_the_tightest_window_of_each_resource_is_told() -> None:
    wide = Standing(Window(KEY, "requests", 100), 50, timedelta(seconds=1))
    narrow = Standing(Window(TENANT, "requests", 60), 10, timedelta(milliseconds=20))
    tokens = Standing(Window(KEY, "tokens", 1_000), 1_000, timedelta())
    assert limits.headers([wide, narrow, tokens]) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "10",
        "x-ratelimit-reset-requests": "20ms",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "0s",
    }
    assert limits.headers([]) == {}


def test_of_two_empty_windows_the_longer_wait_is_told() -> None:
    short = Standing(Window(KEY, "requests", 1), 0, timedelta(seconds=1))
    long = replace(short, window=Window(TENANT, "requests", 5), reset_after=timedelta(seconds=9))
    assert limits.tightest([short, long]) == long


@pytest.mark.parametrize(("size", "generated", "tokens"), [(0, None, 1), (4, None, 1), (5, None, 2), (400, 50, 150)])
def test_a_request_is_charged_for_its_text_and_what_it_allows(size: int, generated: int | None, tokens: int) -> None:
    assert limits.estimated_tokens(size, generated) == tokens


async def test_what_is_refused_by_one_is_counted_for_nobody() -> None:
    counters = MemoryCounters()
    door = gate(counters, key=Allowance(requests_per_minute=5), tenant=Allowance(requests_per_minute=1))
    await door.admit(Use(), KEY, TENANT)
    with pytest.raises(ApiError) as refused:
        await door.admit(use := Use(), KEY, TENANT)
    assert (refused.value.status, refused.value.code, refused.value.type) == (429, "rate_limit_exceeded", "requests")
    assert "of this tenant" in refused.value.message
    assert refused.value.retry_after == timedelta(seconds=2)
    assert use.headers()["x-ratelimit-remaining-requests"] == "0"
    assert counters.used == {(KEY, "requests"): 1, (TENANT, "requests"): 1}


async def test_counters_that_are_away_refuse_nobody() -> None:
    door = gate(MemoryCounters(away=True), key=Allowance(1, 1, None))
    for _ in range(3):
        await door.admit(use := Use(), KEY)
        await door.reserve(use, 5)
        await door.settle(use, 7)
        assert use.headers() == {}


async def test_what_a_generation_used_beyond_its_reservation_is_counted_as_far_as_there_is_room() -> None:
    counters = MemoryCounters()
    door = gate(counters, key=Allowance(tokens_per_minute=100), tenant=Allowance(tokens_per_minute=1_000))
    await door.admit(use := Use(), KEY, TENANT)
    await door.reserve(use, 90)
    assert use.headers()["x-ratelimit-remaining-tokens"] == "10"
    await door.settle(use, 80)
    await door.settle(use, 150)
    await door.settle(use, 150)
    assert counters.used == {(KEY, "tokens"): 100, (TENANT, "tokens"): 150}
    with pytest.raises(ApiError) as refused:
        await door.reserve(use, 1)
    assert refused.value.type == "tokens"


async def test_what_could_never_fit_is_told_so() -> None:
    with pytest.raises(ApiError, match="Request too large") as refused:
        await gate(MemoryCounters(), key=Allowance(tokens_per_minute=10)).reserve(Use((KEY,)), 11)
    assert refused.value.retry_after is None


async def test_a_seat_is_given_back_however_the_stream_ends() -> None:
    counters = MemoryCounters()
    door = gate(counters, key=Allowance(concurrent_streams=1), tenant=Allowance(concurrent_streams=5))
    use = Use((KEY, TENANT))

    async def second() -> None:
        async with door.streaming(use, "two", MINUTE):
            pytest.fail("there was no seat")

    async def broken() -> None:
        async with door.streaming(use, "one", MINUTE):
            with pytest.raises(ApiError, match="1 streams of this API key") as refused:
                await second()
            assert refused.value.type == "streams"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await broken()
    assert counters.seats == set()


# --- through the API ------------------------------------------------------------------------------------------------------


def limited(desk: Any, **allowances: Allowance) -> MemoryCounters:
    counters = MemoryCounters()
    desk.rooms = replace(desk.rooms, gate=gate(counters, **allowances))
    return counters


async def test_every_answer_tells_what_is_left_and_the_refusal_when_to_come_again(desk: Any) -> None:
    limited(desk, key=Allowance(requests_per_minute=2), ip=Allowance(requests_per_minute=100))
    async with desk.client() as client:
        answers = [await client.get("/v1/models") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    error = answers[2].json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
    assert answers[2].headers["retry-after"] == "2"
    assert answers[2].headers["x-ratelimit-reset-requests"] == "2s"


async def test_another_key_of_the_tenant_has_an_allowance_of_its_own(desk: Any) -> None:
    limited(desk, key=Allowance(requests_per_minute=1))
    other = desk.new_key("inference")
    async with desk.client() as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models", headers={"authorization": f"Bearer {other}"})).status_code == 200
        assert (await client.get("/v1/models")).status_code == 429


async def test_what_is_said_of_one_key_takes_the_place_of_what_is_said_of_all(desk: Any) -> None:
    limited(desk, key=Allowance(requests_per_minute=1, concurrent_streams=9))
    async with desk.client() as client:
        body = {"name": "patient", "scopes": ["inference"], "limits": {"requests_per_minute": 2, "spend_per_day": 0.5}}
        desk.store.tenants["default"] = Tenant("default", "d", "active", datetime.now(UTC))
        made = (await client.post("/v1/keys", json=body)).json()
        assert made["limits"] == {
            "requests_per_minute": 2,
            "tokens_per_minute": None,
            "concurrent_streams": None,
            "spend_per_day": 0.5,
        }
        headers = {"authorization": f"Bearer {made['key']}"}
        assert [(await client.get("/v1/models", headers=headers)).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("limits", [{"requests_per_minute": 0}, {"requests": 5}, {"tokens_per_minute": "many"}])
async def test_limits_that_mean_nothing_are_refused(desk: Any, limits: dict[str, Any]) -> None:
    async with desk.client() as client:
        answer = await client.post("/v1/keys", json={"limits": limits})
    assert (answer.status_code, answer.json()["error"]["param"].partition(".")[0]) == (400, "limits")


async def test_requests_without_a_good_key_count_for_their_address(desk: Any) -> None:
    limited(desk, ip=Allowance(requests_per_minute=1))
    async with desk.client(key="wrong") as client:
        assert [(await client.get("/v1/models")).status_code for _ in range(2)] == [401, 429]


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
async def test_users_of_a_tenant_have_allowances_of_their_own(desk: Any, field: str) -> None:
    counters = limited(desk, user=Allowance(requests_per_minute=1))
    counters.used[Holder("user", "default\x00anna"), "requests"] = 1
    async with desk.client() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, field: "anna"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "requests")
    assert desk.log.published == []


@dataclass(frozen=True)
class Recognized:
    """An authenticator that takes everybody for the same."""

    found: Principal

    async def principal(self, _: str | None) -> Principal:
        return self.found


async def test_who_an_access_token_is_of_counts_whomever_the_body_names(desk: Any) -> None:
    counters = limited(desk, user=Allowance(requests_per_minute=1), tenant=Allowance(tokens_per_minute=1))
    anna = Principal("default", "oidc:1", frozenset({"inference"}), user="anna")
    desk.rooms = replace(desk.rooms, authenticator=Recognized(anna))
    async with desk.client() as client:
        chat = await client.post("/v1/chat/completions", json={**CHAT, "user": "bob"})
        assert (chat.status_code, chat.json()["error"]["type"]) == (429, "tokens")
        assert counters.used == {(Holder("user", "default\x00anna"), "requests"): 1}
        again = await client.get("/v1/models")
    assert (again.status_code, again.json()["error"]["type"]) == (429, "requests")


async def test_tokens_are_asked_for_before_a_generation_begins(desk: Any) -> None:
    limited(desk, tenant=Allowance(tokens_per_minute=1_000))
    async with desk.client() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "max_completion_tokens": 1_000})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "tokens")
    assert answer.headers["x-should-retry"] == "false"
    assert desk.log.published == []


async def test_embeddings_are_charged_for_what_was_counted(desk: Any) -> None:
    counters = limited(desk, tenant=Allowance(tokens_per_minute=1_000))
    desk.log.answers = [EmbeddingCompleted(model="vectors", vectors=((1.0,),), token_counts=(77,))]
    async with desk.client() as client:
        answer = await client.post("/v1/embeddings", json={"model": "vectors", "input": "x"})
    assert answer.status_code == 200, answer.text
    assert counters.used == {(Holder("tenant", "default"), "tokens"): 77}


async def test_spending_is_counted_at_the_end_and_stops_the_next_request() -> None:
    counters = MemoryCounters()
    gate = Gate(counters, {"tenant": Allowance(spend_per_day=1_000)})
    use = Use(holders=(Holder("tenant", "t"),))
    await gate.afford(use)
    await gate.settle(use, 0, Decimal("0.0004"))
    await gate.settle(use, 0, None)
    await gate.afford(use)
    await gate.settle(use, 0, Decimal("7"))
    with pytest.raises(ApiError, match=r"0\.001 per day of this tenant") as refused:
        await gate.afford(use)
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "insufficient_quota", None)
    await Gate(None, {"tenant": Allowance(spend_per_day=1)}).afford(use)
