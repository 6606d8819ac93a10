"""Which way an accepted event takes, in which order, and what an operator sees of it. Kafka is played; files are in test_spool_files."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from tessera.bus import Position
from tessera.gateway.adapters.spool import DiskSpool, SpoolLimits
from tessera.gateway.domain import errors
from tessera.gateway.domain.backlog import Place
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.spool import AcceptedEvent
from tessera.gateway.handlers import handoff as module
from tessera.gateway.handlers.handoff import Handoff
from tessera.gateway.workers import drain_spool
from tessera.testkit import eventually

pytestmark = pytest.mark.unit

LIMITS = SpoolLimits(1024 * 1024, 16 * 1024, timedelta(0))


def event(name: str, key: str = "k", *, age: timedelta = timedelta(0)) -> AcceptedEvent:
    headers = (("ce_id", name.encode()), ("ce_type", b"tessera.message.published.v1"))
    return AcceptedEvent(name, "default", "ingest.default", key.encode(), headers, b"{}", datetime.now(UTC) - age)


class Kafka:
    """`ports.Log` as far as a hand-off goes: takes events, or does not."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[AcceptedEvent] = []
        self.never: set[str] = set()
        self.attempts = 0
        self.openings: int | None = None

    @property
    def names(self) -> list[str]:
        return [event.event_id for event in self.taken]

    async def send(self, event: AcceptedEvent) -> Position:
        self.attempts += 1
        await asyncio.sleep(0)
        if event.event_id in self.never:
            raise ApiError(413, "event_too_large", "Larger than Kafka takes.")
        if self.away:
            raise errors.in_doubt()
        self.taken.append(event)
        return Position(event.topic, 0, len(self.taken) - 1)


class Bench:
    """A hand-off over a folder; `restart` is what a killed process leaves behind."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.kafka = Kafka()
        self.folder, self.options = folder, options
        self.store = DiskSpool(folder, LIMITS)
        self.handoff = Handoff(self.kafka, self.store, **options)  # type: ignore[arg-type]

    async def open(self) -> "Bench":
        await self.store.open()
        await self.handoff.adopt()
        return self

    @asynccontextmanager
    async def draining(self) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        drain = asyncio.create_task(self.handoff.drain(stopping))
        try:
            yield
        finally:
            stopping.set()
            await drain

    async def drained(self) -> None:
        async with self.draining():
            await eventually(lambda: self.handoff.state.records == 0)

    async def restart(self) -> None:
        await self.store.close()
        self.store = DiskSpool(self.folder, LIMITS)
        self.handoff = Handoff(self.kafka, self.store, **self.options)  # type: ignore[arg-type]
        await self.open()


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(module, "PAUSE", timedelta(milliseconds=5))
    made = await Bench(tmp_path / "spool").open()
    yield made
    await made.store.close()


async def test_what_kafka_takes_never_touches_the_disk(bench: Bench) -> None:
    assert (await bench.handoff.hand_over(event("a"))).status == "accepted"
    assert (bench.kafka.names, bench.handoff.state.size_bytes) == (["a"], 0)


async def test_what_kafka_does_not_take_is_spooled_and_sent_once_it_does(bench: Bench) -> None:
    bench.kafka.away = True
    given = event("a")
    assert (await bench.handoff.hand_over(given)).status == "spooled"
    assert (bench.handoff.knows("default", "a"), bench.handoff.knows("other", "a")) == (True, False)
    bench.kafka.away = False
    await bench.drained()
    assert bench.kafka.taken == [given]
    assert (bench.handoff.state.size_bytes, bench.handoff.knows("default", "a")) == (0, False)


async def test_without_a_store_the_refusal_is_kafkas() -> None:
    kafka = Kafka()
    kafka.away = True
    handoff = Handoff(kafka)  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="not known") as refused:
        await handoff.hand_over(event("a"))
    assert (refused.value.status, refused.value.code, handoff.takes) == (503, "dependency_unavailable", False)
    assert (handoff.state.enabled, list(handoff.waiting(after=None, limit=5))) == (False, [])


async def test_what_is_wrong_with_an_event_is_no_reason_to_spool_it(bench: Bench) -> None:
    bench.kafka.never = {"a"}
    with pytest.raises(ApiError, match="Larger") as refused:
        await bench.handoff.hand_over(event("a"))
    assert (refused.value.status, bench.handoff.state.records) == (413, 0)


async def test_new_events_of_a_key_go_behind_those_that_wait_and_others_do_not(bench: Bench) -> None:
    bench.kafka.away = True
    await bench.handoff.hand_over(event("first"))
    bench.kafka.away = False
    assert (await bench.handoff.hand_over(event("second"))).status == "spooled"
    assert (await bench.handoff.hand_over(event("other", "o"))).status == "accepted"
    await bench.drained()
    assert bench.kafka.names == ["other", "first", "second"]
    assert (await bench.handoff.hand_over(event("third"))).status == "accepted"


async def test_full_is_503_and_nothing_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.kafka.away = True
    await bench.handoff.hand_over(event("a"))
    monkeypatch.setattr(bench.store, "_limits", SpoolLimits(1, 1, timedelta(0)))
    for name, key in (("doubtful", "o"), ("behind", "k")):
        with pytest.raises(ApiError, match="not known" if key == "o" else "Nothing was done") as refused:
            await bench.handoff.hand_over(event(name, key))
        assert (refused.value.status, refused.value.code, bool(refused.value.retry_after)) == (503, "dependency_unavailable", True)
    assert (bench.handoff.state.full, bench.handoff.takes, bench.handoff.state.records) == (True, False, 1)


async def test_a_restart_finds_what_waits_and_keeps_it_before_what_is_new(bench: Bench) -> None:
    bench.kafka.away = True
    given = [event(f"e-{number}", f"k-{number % 2}") for number in range(6)]
    for one in given:
        await bench.handoff.hand_over(one)
    await bench.restart()
    assert [waiting.event_id for waiting in bench.handoff.waiting(after=None, limit=10)] == [one.event_id for one in given]
    bench.kafka.away = False
    assert (await bench.handoff.hand_over(event("new", "k-0"))).status == "spooled"
    await bench.drained()
    assert [one.event_id for one in bench.kafka.taken if one.key == b"k-0"] == ["e-0", "e-2", "e-4", "new"]
    assert [one for one in bench.kafka.taken if one.key == b"k-1"] == given[1::2]


async def test_an_event_that_waited_too_long_goes_with_its_missed_deadline(bench: Bench) -> None:
    bench.kafka.away = True
    old, young = event("old", age=timedelta(days=2)), event("young")
    await bench.handoff.hand_over(old)
    await bench.handoff.hand_over(young)
    before = REGISTRY.get_sample_value("tessera_spool_sent_total", {"outcome": "expired"}) or 0
    bench.kafka.away = False
    await bench.drained()
    assert bench.kafka.taken == [old.expired(timedelta(days=1)), young]
    assert REGISTRY.get_sample_value("tessera_spool_sent_total", {"outcome": "expired"}) == before + 1


async def test_what_kafka_can_never_take_is_set_aside_and_does_not_block_its_key(bench: Bench) -> None:
    bench.kafka.away = True
    await bench.handoff.hand_over(event("good"))
    bench.kafka.never = {"bad"}
    await bench.handoff.hand_over(event("bad"))
    await bench.handoff.hand_over(event("next"))
    bench.kafka.away = False
    await bench.drained()
    assert bench.kafka.names == ["good", "next"]
    assert len(list(bench.folder.glob("*.damaged"))) == 1


async def test_a_client_that_leaves_does_not_take_its_event_along(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.kafka.away = True
    appending, reached, released = bench.store.append, asyncio.Event(), asyncio.Event()

    async def append(event: AcceptedEvent) -> Place:
        reached.set()
        await released.wait()
        return await appending(event)

    monkeypatch.setattr(bench.store, "append", append)
    leaving = asyncio.create_task(bench.handoff.hand_over(event("a")))
    await reached.wait()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    released.set()
    await eventually(lambda: bench.handoff.knows("default", "a"))
    assert leaving.cancelled()


async def test_while_the_breaker_is_open_nothing_is_tried_and_half_open_one(bench: Bench) -> None:
    bench.kafka.away = True
    for number in range(5):
        await bench.handoff.hand_over(event(f"e-{number}", f"k-{number}"))
    bench.kafka.openings, bench.kafka.attempts = 0, 0
    async with bench.draining():
        assert await bench.handoff.replay(["e-0"], timedelta(seconds=30)) == {"e-0": "waiting"}
        assert bench.kafka.attempts == 0
    assert bench.handoff._room(0) == 0
    bench.kafka.openings = 1
    assert (bench.handoff._room(0), bench.handoff._room(1)) == (1, 0)
    bench.kafka.openings = None
    assert bench.handoff._room(module.WINDOW) == 0


async def test_replay_says_what_became_of_each(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", timedelta(minutes=5))
    bench.kafka.away = True
    for name, key in (("a", "k"), ("b", "k"), ("c", "o")):
        await bench.handoff.hand_over(event(name, key))
    async with bench.draining():
        await eventually(lambda: all(waiting.attempts for waiting in bench.handoff.waiting(after=None, limit=9) if waiting.event_id != "b"))
        assert await bench.handoff.replay(["a"], timedelta(seconds=5)) == {"a": "waiting"}
        bench.kafka.away = False
        assert await bench.handoff.replay(["b", "nobody"], timedelta(seconds=5)) == {"b": "published", "nobody": "not_found"}
        assert bench.kafka.names == ["a", "b"], "c rests on"


async def test_pages_of_what_waits(bench: Bench) -> None:
    bench.kafka.away = True
    for number in range(5):
        await bench.handoff.hand_over(event(f"e-{number}", f"k-{number}"))
    first = bench.handoff.waiting(after=None, limit=2)
    second = bench.handoff.waiting(after=module.record_name(first[-1]), limit=9)
    assert [waiting.event_id for waiting in (*first, *second)] == [f"e-{number}" for number in range(5)]
    assert bench.handoff.expires_at(first[0]) == first[0].accepted_at + timedelta(days=1)


async def test_metrics_say_what_waits_and_for_how_long(bench: Bench) -> None:
    bench.kafka.away = True
    await bench.handoff.hand_over(event("a", age=timedelta(hours=1)))
    bench.handoff.measure()
    assert REGISTRY.get_sample_value("tessera_spool_records") == 1
    assert REGISTRY.get_sample_value("tessera_spool_bytes") == bench.store.size_bytes > 0
    assert (REGISTRY.get_sample_value("tessera_spool_oldest_seconds") or 0) >= 3_600


async def test_a_store_that_fails_costs_time_but_no_event(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.kafka.away = True
    await bench.handoff.hand_over(event("a"))
    bench.kafka.away = False
    reading, failures = bench.store.read, [OSError("gone for a moment"), RuntimeError("a bug")]

    async def read(place: Place) -> AcceptedEvent:
        if failures:
            raise failures.pop()
        return await reading(place)

    async def broken(*_: Any, **__: Any) -> Any:
        raise OSError("read-only file system")

    monkeypatch.setattr(bench.store, "read", read)
    monkeypatch.setattr(bench.store, "settle", broken)
    monkeypatch.setattr(bench.store, "adopt", broken)
    await bench.drained()
    assert (bench.kafka.names, failures) == (["a"], [])


async def test_the_worker_drains_until_it_is_told_to_stop(bench: Bench) -> None:
    bench.kafka.away = True
    await bench.handoff.hand_over(event("a"))
    bench.kafka.away = False
    stopping = asyncio.Event()
    working = asyncio.create_task(drain_spool(bench.handoff)(stopping))
    await eventually(lambda: bench.kafka.names == ["a"])
    stopping.set()
    async with asyncio.timeout(5):
        await working


commands = st.lists(
    st.one_of(st.sampled_from(["break", "mend", "restart", "rest"]), st.tuples(st.just("hand over"), st.sampled_from("ab"))),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(commands)
def test_whatever_happens_nothing_is_lost_and_each_key_keeps_its_order(script: list[Any]) -> None:
    async def play(folder: Path) -> None:
        bench = await Bench(folder).open()
        acknowledged: dict[bytes, list[str]] = defaultdict(list)
        for number, step in enumerate(script):
            match step:
                case "break" | "mend":
                    bench.kafka.away = step == "break"
                case "restart":
                    await bench.restart()
                case "rest":
                    async with bench.draining():
                        await asyncio.sleep(0)
                case (_, key):
                    one = event(f"e-{number}", key)
                    await bench.handoff.hand_over(one)
                    acknowledged[one.key].append(one.event_id)
        bench.kafka.away = False
        await bench.drained()
        for key, names in acknowledged.items():
            first_seen = list(dict.fromkeys(one.event_id for one in bench.kafka.taken if one.key == key))
            assert first_seen == names
        await bench.store.close()

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAUSE", timedelta(milliseconds=1))
        asyncio.run(play(Path(folder)))
