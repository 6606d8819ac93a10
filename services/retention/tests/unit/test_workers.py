"""The sweep worker against jobs kept in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest

from tessera.bus import Origin
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import ArchivedItem, RetentionPolicy
from tessera.resilience import RetryPolicy
from tessera.retention.domain import DueMemory, MemoryMetadata, PlannedItem, SweepState
from tessera.retention.ports import Lease, LeaseLostError, Sweep
from tessera.retention.workers import SweepPacing, SweepWorker
from tessera.testkit.waiting import eventually

pytestmark = pytest.mark.unit

NOW = datetime(2026, 6, 1, tzinfo=UTC)
SHORT = timedelta(milliseconds=1)
ORIGIN = Origin("t", "parent")
SWEEP = Sweep("t", "s", False, None, "running", 1, RetentionPolicy(max_age_days=1), NOW, ORIGIN)


def pacing(**changes: object) -> SweepPacing:
    quick = SweepPacing(poll=SHORT, backoff=RetryPolicy(initial=SHORT, maximum=SHORT))
    return replace(quick, **changes)  # type: ignore[arg-type]


def memories(count: int) -> list[MemoryMetadata]:
    return [MemoryMetadata(f"{number:05}", "message", NOW - timedelta(days=3), 0.5, 1) for number in range(count)]


@dataclass
class FakeStep:
    """A step whose effects are kept only when it ends well."""

    jobs: FakeJobs
    sweep: Sweep

    async def memories(self, limit: int) -> Sequence[MemoryMetadata]:
        return [memory for memory in self.jobs.memories if memory.memory_id > self.sweep.cursor][:limit]

    async def named_by_plan(self, limit: int) -> Sequence[DueMemory]:
        return [DueMemory(memory, "max_age") for memory in await self.memories(limit)]

    async def plan(self, items: Sequence[DueMemory], *, cursor: str | None) -> None:
        self.jobs.items |= {item.memory.memory_id: "planned" for item in items}
        self.jobs.sweep = replace(self.sweep, cursor=cursor or self.sweep.cursor, planned=cursor is None)
        self.sweep = self.jobs.sweep

    async def open_items(self, limit: int) -> Sequence[PlannedItem]:
        named = [memory_id for memory_id, state in self.jobs.items.items() if state == "planned"]
        return [PlannedItem(memory_id, 1, self.jobs.versions.get(memory_id, 1), archived=False) for memory_id in named[:limit]]

    async def ask(self, requested: Sequence[ArchivedItem], skipped: Mapping[str, str], *, last: bool) -> None:
        self.jobs.items |= {item.memory_id: "requested" for item in requested} | dict.fromkeys(skipped, "skipped")
        self.jobs.asked.append([item.memory_id for item in requested])
        self.jobs.sweep = replace(self.sweep, requested_at=datetime.now(UTC) if last else None)

    async def unconfirmed(self) -> int:
        return sum(state == "requested" for state in self.jobs.items.values())

    async def finish(self, state: SweepState, problem: Problem | None = None) -> None:
        self.jobs.sweep = replace(self.sweep, state=state, problem=problem)

    async def pause(self, delay: timedelta, *, spent: bool = False) -> None:
        self.jobs.attempts = self.jobs.attempts if spent else 0
        self.jobs.gave_way += delay == timedelta(0)


@dataclass
class FakeJobs:
    """One sweep."""

    sweep: Sweep = SWEEP
    memories: list[MemoryMetadata] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    items: dict[str, str] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    """Raised by the next steps, one each."""
    unavailable: list[Exception] = field(default_factory=list)
    """Raised by the next claims, one each."""
    attempts: int = 0
    gave_way: int = 0

    async def claim(self) -> Lease | None:
        await asyncio.sleep(0)  # as a database would, let others run
        if self.unavailable:
            raise self.unavailable.pop()
        if self.sweep.state != "running":
            return None
        self.attempts += 1
        return Lease("t", "s", 1, self.attempts, ORIGIN)

    @asynccontextmanager
    async def step(self, lease: Lease) -> AsyncIterator[FakeStep]:
        if self.failures:
            raise self.failures.pop()
        yield FakeStep(self, self.sweep)

    def confirm(self) -> None:
        self.items = {memory_id: "archived" if state == "requested" else state for memory_id, state in self.items.items()}


async def ended(jobs: FakeJobs, worker: SweepWorker, *, confirming: bool = True) -> FakeJobs:
    stopping = asyncio.Event()
    running = asyncio.create_task(worker.run(stopping))

    def over() -> bool:
        if confirming:
            jobs.confirm()
        return jobs.sweep.state != "running"

    await eventually(over)
    stopping.set()
    await asyncio.wait_for(running, 5)
    return jobs


async def test_pages_are_planned_and_chunks_asked_for_until_all_is_confirmed() -> None:
    jobs = await ended(jobs := FakeJobs(memories=memories(1_203)), SweepWorker(jobs, pacing()))
    assert jobs.sweep.state == "completed"
    assert [len(chunk) for chunk in jobs.asked] == [200] * 6 + [3]
    assert set(jobs.items.values()) == {"archived"}


async def test_a_large_sweep_gives_way_to_others_every_few_steps() -> None:
    jobs = await ended(jobs := FakeJobs(memories=memories(4_001)), SweepWorker(jobs, pacing()))
    assert jobs.sweep.state == "completed"
    assert jobs.gave_way == 2, "5 pages and 21 chunks are 26 steps"


async def test_a_dry_run_ends_planned_and_asks_for_nothing() -> None:
    jobs = FakeJobs(sweep=replace(SWEEP, dry_run=True), memories=memories(3))
    await ended(jobs, SweepWorker(jobs, pacing()))
    assert (jobs.sweep.state, jobs.asked, set(jobs.items.values())) == ("planned", [], {"planned"})


async def test_a_plan_is_carried_out_without_asking_the_policy_again() -> None:
    jobs = FakeJobs(sweep=replace(SWEEP, policy=None, plan_id="p"), memories=memories(1_001))
    await ended(jobs, SweepWorker(jobs, pacing()))
    assert (jobs.sweep.state, len(jobs.items)) == ("completed", 1_001)


async def test_what_changed_is_skipped() -> None:
    jobs = FakeJobs(memories=memories(2), versions={"00001": 2})
    await ended(jobs, SweepWorker(jobs, pacing()))
    assert jobs.items == {"00000": "archived", "00001": "skipped"}


async def test_a_memory_that_never_answers_ends_the_sweep() -> None:
    jobs = FakeJobs(memories=memories(1))
    await ended(jobs, SweepWorker(jobs, pacing(confirmation=SHORT)), confirming=False)
    assert (jobs.sweep.state, jobs.sweep.problem and jobs.sweep.problem.code) == ("failed", "confirmation_overdue")


async def test_storage_that_is_away_delays_and_spends_no_attempt() -> None:
    jobs = FakeJobs(memories=memories(1), unavailable=[RetryableError("away")] * 3, failures=[RetryableError("away")] * 20)
    await ended(jobs, SweepWorker(jobs, pacing(attempts=20)))
    assert jobs.sweep.state == "completed"


async def test_a_step_that_always_breaks_ends_the_sweep() -> None:
    jobs = FakeJobs(memories=memories(1))
    jobs.attempts = 5
    await ended(jobs, SweepWorker(jobs, pacing(attempts=5)))
    assert (jobs.sweep.state, jobs.sweep.problem and jobs.sweep.problem.code) == ("failed", "sweep_failed")


async def test_a_worker_takes_another_pace_up() -> None:
    jobs = FakeJobs(memories=memories(1))
    jobs.attempts = 5
    worker = SweepWorker(jobs, pacing(attempts=20))
    worker.pace(pacing(attempts=5))
    await ended(jobs, worker)
    assert jobs.sweep.state == "failed"


async def test_a_broken_step_is_logged_and_tried_again() -> None:
    jobs = FakeJobs(memories=memories(1), failures=[ValueError("broken")])
    await ended(jobs, SweepWorker(jobs, pacing()))
    assert jobs.sweep.state == "completed"


async def test_a_lost_lease_is_left_to_its_new_holder() -> None:
    jobs = FakeJobs(memories=memories(1), failures=[LeaseLostError("taken over")])
    await ended(jobs, SweepWorker(jobs, pacing()))
    assert jobs.sweep.state == "completed"
