"""The keys of a provider: when it is asked for them, what it may answer, and what goes on while it is away."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import pytest

from tessera.gateway.adapters.issuer import Freshness, Issuer, IssuerKeys, IssuerUnavailableError, Jwk
from tessera.gateway.domain.errors import ApiError
from tessera.resilience import Breaker, CircuitOpenError
from tessera.testkit.issuer import SigningKey, signing_key

pytestmark = pytest.mark.unit

ISSUER = "https://login.example.com/realms/tessera"
FRESHNESS = Freshness(timedelta(seconds=300), timedelta(seconds=10), timedelta(seconds=3_600))
OLD, NEW = signing_key("old"), signing_key("new")


@dataclass
class Published:
    """`issuer.KeySource` in memory."""

    keys_there: Sequence[SigningKey] = (OLD,)
    away: bool = False
    asked: int = 0
    answering: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answering.set()

    async def keys(self) -> Sequence[Jwk]:
        self.asked += 1
        await self.answering.wait()
        if self.away:
            raise IssuerUnavailableError("away")
        return [key.jwk() for key in self.keys_there]


class Bench:
    """Keys with a clock that a test turns."""

    def __init__(self) -> None:
        self.now: float = 0
        self.source = Published()
        self.breaker = Breaker("issuer", failure_threshold=3, reset_after=timedelta(seconds=10), clock=lambda: self.now)
        self.keys = IssuerKeys(self.source, ["ES256"], self.breaker, FRESHNESS, lambda: self.now)

    async def finds(self, key_id: str | None) -> bool:
        return await self.keys.find("ES256", key_id) is not None


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_keys_are_fetched_once_and_found_without_asking(bench: Bench) -> None:
    with pytest.raises(IssuerUnavailableError, match="not asked"):
        await bench.keys.check()
    for _ in range(3):
        assert await bench.finds("old")
    await bench.keys.once()
    await bench.keys.check()
    assert bench.source.asked == 1


async def test_a_flood_of_forged_ids_asks_the_issuer_once_in_a_while(bench: Bench) -> None:
    await bench.keys.once()
    for bench.now in range(31):
        for number in range(50):
            assert not await bench.finds(f"forged-{number}")
    assert bench.source.asked == 1 + 3  # at 10 s, 20 s and 30 s


async def test_all_who_wait_share_one_question(bench: Bench) -> None:
    bench.source.answering.clear()
    waiting = [asyncio.create_task(bench.finds("old")) for _ in range(50)]
    leaving = asyncio.create_task(bench.finds("old"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    bench.source.answering.set()
    assert all(await asyncio.gather(*waiting))
    assert (bench.source.asked, leaving.cancelled()) == (1, True)


async def test_a_new_key_works_at_once_and_a_withdrawn_one_no_longer_than_keys_are_kept_fresh(bench: Bench) -> None:
    await bench.keys.once()
    bench.now = 20
    bench.source.keys_there = (OLD, NEW)
    assert await bench.finds("new")
    bench.source.keys_there = (NEW,)
    bench.now = 319
    await bench.keys.once()
    assert await bench.finds("old")
    bench.now = 320
    await bench.keys.once()
    assert not await bench.finds("old")
    assert await bench.finds("new")


async def test_without_the_issuer_known_keys_go_on_and_others_cannot_be_judged(bench: Bench) -> None:
    await bench.keys.once()
    bench.source.away, bench.now = True, 400
    for expected in (IssuerUnavailableError, IssuerUnavailableError, IssuerUnavailableError, CircuitOpenError):
        with pytest.raises(expected):
            await bench.keys.once()
    assert (bench.source.asked, bench.breaker.state) == (4, "open")
    with pytest.raises(IssuerUnavailableError, match="away"):
        await bench.keys.check()
    assert await bench.finds("old")
    with pytest.raises(ApiError) as refused:
        await bench.finds("new")
    assert (refused.value.status, refused.value.code, refused.value.retry_after is None) == (503, "dependency_unavailable", False)
    assert bench.source.asked == 4, "the breaker is open"
    bench.now = 3_600
    with pytest.raises(ApiError):
        await bench.finds("old")
    bench.source.away, bench.now = False, 3_620
    assert await bench.finds("old")
    await bench.keys.check()
    assert bench.breaker.state == "closed"


async def test_started_without_the_issuer_it_is_asked_until_it_answers(bench: Bench) -> None:
    bench.source.away = True
    with pytest.raises(IssuerUnavailableError):
        await bench.keys.once()
    with pytest.raises(ApiError):
        await bench.finds("old")
    bench.source.away = False
    await bench.keys.once()
    assert await bench.finds("old")


async def test_what_the_issuer_says_counts_also_where_it_is_nothing(bench: Bench) -> None:
    await bench.keys.once()
    bench.source.keys_there, bench.now = (), 300
    await bench.keys.once()
    assert not await bench.finds("old")
    with pytest.raises(IssuerUnavailableError, match="no key"):
        await bench.keys.check()


# --- over HTTP --------------------------------------------------------------------------------------------------------

Answer = Callable[[httpx.Request], httpx.Response]
CONFIGURATION = {"issuer": ISSUER, "jwks_uri": "https://keys.example.com/set"}
SET = {"keys": [OLD.jwk(), "no key"]}


def said(content: bytes, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, stream=httpx.ByteStream(content), headers=headers)


async def fetched(answer: Answer, jwks_url: str | None = None) -> Sequence[Jwk]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        return await Issuer(client, ISSUER, jwks_url, timedelta(seconds=0.2)).keys()


def answering(**documents: Any) -> Answer:
    """By host; what is no response is JSON."""

    def answer(request: httpx.Request) -> httpx.Response:
        document = documents[request.url.host.partition(".")[0]]
        return document if isinstance(document, httpx.Response) else said(json.dumps(document).encode())

    return answer


async def test_the_address_of_the_keys_is_discovered_or_given() -> None:
    assert await fetched(answering(login=CONFIGURATION, keys=SET)) == [OLD.jwk()]
    assert await fetched(answering(keys=SET), "https://keys.example.com/given") == [OLD.jwk()]


@pytest.mark.parametrize(
    ("login", "keys"),
    [
        (CONFIGURATION, {"keys": "none"}),
        (CONFIGURATION, []),
        (CONFIGURATION, said(b"\xff\xfe")),
        (CONFIGURATION, said(b"[" * 100_000)),
        (CONFIGURATION, said(b" " * 300_000)),
        (CONFIGURATION, said(b"{}", 404)),
        (CONFIGURATION, said(json.dumps(SET).encode(), 302, location="https://keys.example.com/elsewhere")),
        (CONFIGURATION, said(b"{}", 500)),
        ({**CONFIGURATION, "issuer": ISSUER + "/"}, SET),
        ({"issuer": ISSUER}, SET),
        ({**CONFIGURATION, "jwks_uri": 7}, SET),
        ({**CONFIGURATION, "jwks_uri": "http://keys.example.com/set"}, SET),
        ({**CONFIGURATION, "jwks_uri": "https://keys:port/"}, SET),
        (said(b"{}", 503), SET),
    ],
)
async def test_whatever_else_it_answers_is_no_key_set(login: Any, keys: Any) -> None:
    with pytest.raises(IssuerUnavailableError):
        await fetched(answering(login=login, keys=keys))


async def test_an_issuer_that_drips_is_not_waited_for() -> None:
    class Drip(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            while True:
                yield b" "
                await asyncio.sleep(0.01)

    with pytest.raises(IssuerUnavailableError, match="Timeout"):
        await fetched(answering(keys=httpx.Response(200, stream=Drip())), "https://keys.example.com/set")


async def test_an_issuer_that_cannot_be_reached() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(IssuerUnavailableError, match="ConnectError"):
        await fetched(refuse)
