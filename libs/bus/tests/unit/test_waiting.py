"""Readers who wait: bounded, woken, in turn, and never for longer than they asked."""

from __future__ import annotations

import asyncio

import pytest

from tessera.bus.waiting import Turns, WaitingRoom
from tessera.testkit import eventually


def clock() -> float:
    return asyncio.get_running_loop().time()


class Reader:
    """Looks, and is done once `fresh` is set or it is told that this was the last look."""

    def __init__(self) -> None:
        self.fresh = False
        self.looks = 0
        self.ended: str | None = None

    async def __call__(self, last: bool) -> bool:
        self.looks += 1
        if self.fresh or last:
            self.ended = "fresh" if self.fresh else "late"
        return self.ended is not None


async def test_a_reader_is_woken_by_progress_long_before_it_would_look_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.bus.waiting.FIRST_PAUSE_SECONDS", 3_600.0)
    monkeypatch.setattr("tessera.bus.waiting.LONGEST_PAUSE_SECONDS", 3_600.0)
    room, reader = WaitingRoom(), Reader()
    room.admit("a", reader, clock() + 3_600)
    await eventually(lambda: reader.looks == 1)
    reader.fresh = True

    def told() -> bool:
        room.changed()
        return reader.ended == "fresh"

    await eventually(told)
    assert len(room) == 0


async def test_a_reader_looks_again_although_nobody_tells_it_anything() -> None:
    room, reader = WaitingRoom(), Reader()
    room.admit("a", reader, clock() + 60)
    await eventually(lambda: reader.looks >= 2)
    reader.fresh = True
    await eventually(lambda: reader.ended == "fresh")


async def test_a_reader_looks_a_last_time_at_its_limit() -> None:
    room, reader, began = WaitingRoom(), Reader(), clock()
    room.admit("a", reader, began + 0.05)
    await eventually(lambda: reader.ended == "late")
    assert clock() >= began + 0.05


async def test_a_room_that_closes_lets_everybody_look_a_last_time() -> None:
    room, stopping = WaitingRoom(), asyncio.Event()
    readers = [Reader() for _ in range(20)]
    for number, reader in enumerate(readers):
        room.admit(f"tenant-{number % 3}", reader, clock() + 3_600)
    running = asyncio.create_task(room.run(stopping))
    await eventually(lambda: all(reader.looks for reader in readers))
    stopping.set()
    await running
    assert {reader.ended for reader in readers} == {"late"}
    assert not room.admits("tenant-0")


async def test_one_tenant_cannot_fill_the_room_and_a_reader_that_ends_makes_place() -> None:
    room, readers = WaitingRoom(readers=3, per_tenant=2), [Reader(), Reader(), Reader()]
    for reader in readers[:2]:
        assert room.admits("greedy")
        room.admit("greedy", reader, clock() + 60)
    assert not room.admits("greedy")
    assert room.admits("modest")
    room.admit("modest", readers[2], clock() + 60)
    assert not room.admits("third")
    readers[0].fresh = True
    await eventually(lambda: room.admits("greedy"))
    for reader in readers:
        reader.fresh = True
    await eventually(lambda: len(room) == 0)


async def test_a_look_that_fails_ends_that_reader_alone() -> None:
    async def broken(_: bool) -> bool:
        raise RuntimeError("the look failed")

    room, reader = WaitingRoom(), Reader()
    room.admit("a", broken, clock() + 60)
    room.admit("a", reader, clock() + 60)
    await eventually(lambda: len(room) == 1)
    reader.fresh = True
    await eventually(lambda: len(room) == 0)


async def test_turns_go_round_the_tenants_however_many_wait_of_each() -> None:
    turns, order, entered = Turns(1), [], asyncio.Event()

    async def visit(tenant: str) -> None:
        async with turns.of(tenant):
            order.append(tenant)

    async def hold() -> None:
        async with turns.of("holder"):
            await entered.wait()

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    visits = [asyncio.create_task(visit(tenant)) for tenant in ("a", "a", "a", "a", "b", "c")]
    await asyncio.sleep(0)
    entered.set()
    await asyncio.gather(holder, *visits)
    assert order == ["a", "b", "c", "a", "a", "a"]


async def test_a_turn_that_nobody_takes_any_more_is_passed_on() -> None:
    turns = Turns(1)
    release = asyncio.Event()

    async def hold() -> None:
        async with turns.of("a"):
            await release.wait()

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    leaving, staying = asyncio.create_task(hold()), asyncio.create_task(hold())
    await asyncio.sleep(0)
    leaving.cancel()
    release.set()
    await asyncio.wait_for(asyncio.gather(holder, staying), 5)
    async with asyncio.timeout(5), turns.of("b"):
        assert leaving.cancelled()
