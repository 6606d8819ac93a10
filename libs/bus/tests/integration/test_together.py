"""Small batches of several partitions in one transaction (docs/delivery.md), on a real Kafka and a real Postgres."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from tessera.bus import BatchTransaction, Bus, Received, Transaction, faults, together
from tessera.contracts.events import MessagePublished
from tessera.testkit import CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TENANT = {"tenantid": "acme"}
PATIENT = timedelta(seconds=30)


class Held:
    """The probe's handler, which waits at the event `first` until it is told to go on: what comes meanwhile shares the next transaction."""

    def __init__(self, probe: Any) -> None:
        self.began: list[str] = []
        self.sizes: list[int] = []
        self.go_on = asyncio.Event()
        self.within: dict[str, Callable[[], Awaitable[Any]]] = {}
        """What happens, by content, while the transaction of the event is open."""
        self._probe = probe
        self.bus: Bus | None = None

    async def one(self, event: Received[MessagePublished], transaction: Transaction) -> None:
        content = str(event.data.content)
        self.began.append(content)
        if content == "first":
            await self.go_on.wait()
        await self.within.get(content, self._nothing)()
        await self._probe.apply(event, transaction)

    async def many(self, events: Sequence[Received[MessagePublished]], batch: BatchTransaction) -> None:
        self.sizes.append(len(events))
        for event in events:
            await self.one(event, batch.of(event))

    @staticmethod
    async def _nothing() -> None:
        """Most events are like that."""

    def waiting(self) -> int:
        """Partitions that wait for the next transaction."""
        assert self.bus is not None
        shared = self.bus.consumer("ingestion")._together
        return 0 if shared is None else len(shared._waiting)

    def queued(self, partition: int) -> bool:
        """Whether a record of a partition has been fetched and waits for its loop."""
        return any(loop.waiting for place, loop in self._loops() if place.partition == partition and place.topic.endswith("ingest"))

    def loop(self, partition: int) -> Any:
        return next(loop for place, loop in self._loops() if place.partition == partition and place.topic.endswith("ingest"))

    def _loops(self) -> Sequence[tuple[Any, Any]]:
        assert self.bus is not None
        return list(self.bus.consumer("ingestion")._loops.items())


@pytest.fixture
def held(probe: Any) -> Held:
    return Held(probe)


@pytest.fixture
def sharing(
    running: Callable[..., Any], probe: Any, producer: CloudEventProducer, held: Held, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs the bus until the next transaction of ingestion will hold one event of each of two partitions."""

    @asynccontextmanager
    async def run(
        first: str, second: str, *, batched: bool = False, same_id: bool = False, patience: timedelta = PATIENT
    ) -> AsyncIterator[Any]:
        monkeypatch.setattr(together, "PATIENCE", patience)
        monkeypatch.setattr(together, "SLOW", PATIENT)  # this machine may be slow

        def register(bus: Bus) -> None:
            held.bus = bus
            probe.register(bus, held.many if batched else held.one, batched=batched)

        async def publish(identity: str, content: str, partition: int) -> None:
            message = MessagePublished(conversation_id="c", role="user", content=content)
            await producer.publish("ingest", message, id=identity, partition=partition, **TENANT)

        async with running(register=register) as started:
            await publish("m0", "first", 0)
            await eventually(lambda: held.began == ["first"], PATIENT)
            await publish("m1", first, 0)
            await publish("m1" if same_id else "m2", second, 1)
            if patience == PATIENT:
                await eventually(lambda: held.waiting() == 1 and held.queued(0), PATIENT)
            yield started
            held.go_on.set()

    return run


async def transactions(ground: Any) -> dict[str, str]:
    """Which transaction wrote the row of each content."""
    return {row["content"]: row["xmin"] for row in await ground.rows("SELECT content, xmin::text FROM memory.effect")}


async def positions(ground: Any) -> dict[int, int]:
    rows = await ground.rows("SELECT partition, next_offset FROM memory.consumer_position WHERE topic = 'ingest'")
    return {row["partition"]: row["next_offset"] for row in rows}


async def marks(ground: Any) -> set[int]:
    return {row["partition"] for row in await ground.rows("SELECT partition FROM memory.batch_mark WHERE topic = 'ingest'")}


def at(ground: Any, expected: dict[int, int]) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return await positions(ground) == expected

    return reached


@pytest.mark.parametrize("batched", [False, True])
async def test_what_comes_while_a_transaction_runs_shares_the_next_one(ground: Any, sharing: Any, held: Held, *, batched: bool) -> None:
    async with sharing("left", "right", batched=batched):
        held.go_on.set()
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
    wrote = await transactions(ground)
    assert wrote["left"] == wrote["right"] != wrote["first"]
    assert held.began == ["first", "left", "right"]
    assert held.sizes == ([1, 2] if batched else [])
    assert await marks(ground) == set()


async def test_each_partition_is_marked_before_a_shared_transaction_handles_anything(ground: Any, sharing: Any, held: Held) -> None:
    found: list[set[int]] = []

    async def look() -> None:
        found.append(await marks(ground))

    held.within["left"] = look
    async with sharing("left", "right"):
        held.go_on.set()
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
    assert found == [{0, 1}]


async def test_of_those_that_share_only_the_culprit_is_refused(ground: Any, sharing: Any, held: Held, reader: Callable[..., Any]) -> None:
    async with sharing("invalid", "right"):
        held.go_on.set()
        [letter] = await reader("ingest.memory.dlq").read(1, PATIENT)
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
    assert letter.id == "m1"
    assert set(await transactions(ground)) == {"first", "right"}
    assert held.began.count("right") <= 2
    assert await marks(ground) == set()


async def test_a_fenced_partition_writes_nothing_and_its_neighbour_goes_on(ground: Any, sharing: Any, held: Held) -> None:
    async def take_over() -> None:
        held.within.clear()
        await ground.rows("UPDATE memory.consumer_position SET next_offset = 2 WHERE topic = 'ingest' AND partition = 0")

    held.within["left"] = take_over
    async with sharing("left", "right"):
        held.go_on.set()
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
        await eventually(lambda: held.loop(0).position == 2, PATIENT)
    assert set(await transactions(ground)) == {"first", "right"}
    assert await marks(ground) == {0}  # as whoever took the partition over finds it


async def test_one_that_was_fenced_before_its_mark_is_left_out(ground: Any, sharing: Any, held: Held) -> None:
    async with sharing("left", "right"):
        await ground.rows("UPDATE memory.consumer_position SET next_offset = 1 WHERE topic = 'ingest' AND partition = 1")
        held.go_on.set()
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
        await eventually(lambda: held.loop(1).position == 1, PATIENT)
    assert set(await transactions(ground)) == {"first", "left"}
    assert held.began == ["first", "left"]
    assert await marks(ground) == set()


async def test_an_event_that_is_repeated_on_another_partition_has_one_effect(ground: Any, sharing: Any, held: Held) -> None:
    async with sharing("twice", "twice", same_id=True):
        held.go_on.set()
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
    assert held.began == ["first", "twice"]


async def test_an_identity_that_is_used_again_within_a_shared_transaction_is_refused(
    ground: Any, sharing: Any, held: Held, reader: Callable[..., Any]
) -> None:
    async with sharing("one", "another", same_id=True):
        held.go_on.set()
        [letter] = await reader("ingest.memory.dlq").read(1, PATIENT)
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
    assert letter.headers["tessera_dead_letter_code"] == b"event_id_reused"
    assert len(await transactions(ground)) == 2


async def test_a_stop_finishes_a_shared_transaction(ground: Any, sharing: Any, held: Held) -> None:
    stopping: list[asyncio.Task[None]] = []
    goes_on = asyncio.Event()
    held.within["left"] = goes_on.wait
    async with sharing("left", "right") as started:
        held.go_on.set()
        await eventually(lambda: "left" in held.began, PATIENT)
        stopping.append(asyncio.create_task(started.bus.drain()))
        await eventually(lambda: held.loop(0).state == held.loop(1).state == "stopped", PATIENT)
        goes_on.set()
        await stopping[0]
    wrote = await transactions(ground)
    assert wrote["left"] == wrote["right"]
    assert await marks(ground) == set()


async def test_a_loop_that_is_cut_off_rolls_back_and_the_other_goes_its_own_way(ground: Any, sharing: Any, held: Held) -> None:
    never = asyncio.Event()
    held.within["left"] = never.wait
    async with sharing("left", "right"):
        held.go_on.set()
        await eventually(lambda: "left" in held.began, PATIENT)
        await held.loop(0).close(timedelta(0))
        await eventually(at(ground, {0: 1, 1: 1}), PATIENT)
        assert await marks(ground) == set()  # it was no death
    assert set(await transactions(ground)) == {"first", "right"}


async def test_nobody_waits_long_for_anothers_handler(ground: Any, sharing: Any, held: Held) -> None:
    async with sharing("left", "right", patience=timedelta(milliseconds=500)):
        await eventually(at(ground, {0: 0, 1: 1}), PATIENT)
        assert held.began == ["first", "right"]


async def test_partitions_go_apart_after_a_transaction_that_was_slow(
    ground: Any, sharing: Any, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sharing("left", "right"):
        monkeypatch.setattr(together, "SLOW", timedelta(0))
        held.go_on.set()
        await eventually(at(ground, {0: 2, 1: 1}), PATIENT)
    wrote = await transactions(ground)
    assert wrote["left"] != wrote["right"]


async def test_a_kill_inside_leaves_the_mark_of_every_partition(ground: Any, producer: CloudEventProducer, process: Any) -> None:
    async def publish(number: int, content: str, partition: int) -> None:
        message = MessagePublished(conversation_id="c", role="user", content=content)
        await producer.publish("ingest", message, id=f"m{number}", partition=partition, **TENANT)

    async def marked() -> bool:
        return bool(await marks(ground))

    async def all_applied() -> bool:
        return len(await transactions(ground)) == 3

    await process.start(PROBE_SHARES="yes", TESSERA__CRASH_POINT=f"{faults.CONSUMED_BEFORE_COMMIT}:2")
    await eventually(lambda: "service started" in process.log(), PATIENT)
    await publish(0, "slow0.7", 0)
    await eventually(marked, PATIENT)
    await publish(1, "left", 0)
    await publish(2, "right", 1)
    assert await process.ended() == -signal.SIGKILL, process.log()
    assert set(await transactions(ground)) == {"slow0.7"}
    assert await marks(ground) == {0, 1}
    await process.start()
    await eventually(all_applied, PATIENT)
    process.tell(signal.SIGTERM)
    assert await process.ended() == 0, process.log()
    assert process.log().count("a batch died before its commit") == 2
    assert await marks(ground) == set()
