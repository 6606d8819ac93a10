"""Job rows: one lease at a time, every write fenced, nothing waits for a dead worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tessera.bus import Origin, Transaction
from tessera.contracts import ChatMessage
from tessera.generator.adapters.postgres_jobs import MAXIMUM_LAPSES, PostgresIntake, PostgresJobStore
from tessera.generator.adapters.postgres_signals import JobListener
from tessera.generator.domain.endings import CANCELLED, LeaseLostError, failed
from tessera.generator.domain.transcript import Progress
from tessera.generator.ports import NewJob, TenantShares
from tessera.generator.workers import Signals
from tessera.storage import Database
from tessera.testkit import eventually

pytestmark = pytest.mark.integration
NewJobs = Callable[..., NewJob]
LEASE, AT_ONCE = timedelta(seconds=30), timedelta(0)


class DatabaseTransactions:
    """The bus's transactions without its outbox relay: what would be published is kept."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.rows: list[Any] = []

    @asynccontextmanager
    async def transaction(self, origin: Origin) -> AsyncIterator[Transaction]:
        rows: list[Any] = []
        async with self._database.transaction() as connection:
            yield Transaction(connection, origin, "generator", rows)
        self.rows += rows


@pytest.fixture
def bus(database: Database) -> DatabaseTransactions:
    return DatabaseTransactions(database)


@pytest.fixture
def store(database: Database, bus: DatabaseTransactions) -> PostgresJobStore:
    return PostgresJobStore(database, bus)


@pytest.fixture
def provider() -> str:
    """A provider of this test's own: its rows are nobody else's."""
    return f"p-{uuid4().hex[:8]}"


async def add(bus: DatabaseTransactions, *jobs: NewJob) -> list[str]:
    admissions = []
    for job in jobs:
        async with bus.transaction(job.origin) as transaction:
            admissions.append(await PostgresIntake(transaction).add(job))
    return admissions


async def cancel(bus: DatabaseTransactions, job: NewJob, tenant_id: str = "acme") -> None:
    async with bus.transaction(job.origin) as transaction:
        await PostgresIntake(transaction).cancel(tenant_id, job.ready.request.generation_id, "client_request")


async def row(database: Database, job: NewJob) -> Any:
    async with database.transaction() as connection:
        query = text("SELECT * FROM generation_job WHERE generation_id = :generation_id")
        return (await connection.execute(query, {"generation_id": job.ready.request.generation_id})).one()


async def test_a_job_survives_the_row_whole(store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs) -> None:
    new = new_job(provider, memories=[("m1", "text \U0001f600")])
    assert await add(bus, new, new) == ["added", "known"]
    (job,) = await store.claim(provider, 5, LEASE)
    assert (job.ready, job.origin, job.deadline, job.attempt, job.progress) == (new.ready, new.origin, new.deadline, 1, Progress())
    assert await store.claim(provider, 5, LEASE) == []


async def test_a_nul_in_the_parts_of_a_message_is_kept(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    new = new_job(provider, messages=(ChatMessage(role="user", content=({"type": "text", "text": "a\x00b"},)),))
    await add(bus, new)
    (job,) = await store.claim(provider, 1, LEASE)
    assert job.ready == new.ready


async def test_an_unreadable_row_stops_nobody_else(
    store: PostgresJobStore, database: Database, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    unreadable, other = new_job(provider), new_job(provider)
    await add(bus, unreadable, other)
    async with database.transaction() as connection:
        query = text("UPDATE generation_job SET ready = '{}' WHERE generation_id = :generation_id")
        await connection.execute(query, {"generation_id": unreadable.ready.request.generation_id})
    (job,) = await store.claim(provider, 5, LEASE)
    assert job.ready == other.ready
    assert (await row(database, unreadable)).state == "failed"
    assert [sent.topic for sent in bus.rows] == ["reply"]


async def test_many_workers_never_share_a_job(store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs) -> None:
    jobs = [new_job(provider) for _ in range(12)]
    await add(bus, *jobs)
    claims = await asyncio.gather(*(store.claim(provider, 3, LEASE) for _ in range(6)))
    claimed = [job.generation_id for claim in claims for job in claim]
    rest = [job.generation_id for job in await store.claim(provider, 20, LEASE)]
    assert sorted(claimed + rest) == sorted(job.ready.request.generation_id for job in jobs)


async def test_a_lapsed_lease_is_taken_over_and_fences_its_former_holder(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    await add(bus, new_job(provider))
    (first,) = await store.claim(provider, 1, AT_ONCE)
    await store.record(first, Progress(2, 5, "Hello wor"))
    (second,) = await store.claim(provider, 1, LEASE)
    assert (second.attempt, second.progress) == (2, Progress(2, 5, "Hello wor"))
    assert await store.renew(first, LEASE) == "lost"
    with pytest.raises(LeaseLostError):
        await store.record(first, Progress(3, 9, "Hello world"))
    with pytest.raises(LeaseLostError):
        await store.finish(first, failed(first.generation_id, 1, first.progress, CANCELLED))
    await store.postpone(first, AT_ONCE)
    assert await store.renew(second, LEASE) == "held"
    assert bus.rows == []


async def test_finishing_empties_the_row_and_publishes_once(
    store: PostgresJobStore, database: Database, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    new = new_job(provider)
    await add(bus, new)
    (job,) = await store.claim(provider, 1, LEASE)
    await store.finish(job, failed(job.generation_id, 1, job.progress, CANCELLED))
    kept = await row(database, new)
    assert (kept.state, kept.ready, kept.sent_text) == ("cancelled", None, "")
    assert [(sent.topic, sent.partition) for sent in bus.rows] == [("reply", 3), ("generation.ended", None)]
    assert await store.claim(provider, 1, LEASE) == []


async def test_a_cancellation_before_and_after_the_start(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    early, waiting, running = (new_job(provider) for _ in range(3))
    await cancel(bus, early)
    assert await add(bus, early, running) == ["cancelled_before", "added"]
    (job,) = await store.claim(provider, 1, LEASE)
    await add(bus, waiting)
    await cancel(bus, waiting)
    await cancel(bus, running, tenant_id="mallory")
    assert await store.renew(job, LEASE) == "held"
    await cancel(bus, running)
    assert await store.renew(job, LEASE) == "cancelled"
    assert await store.claim(provider, 5, LEASE) == []
    ended = {item.job.generation_id: item.reason for item in await store.claim_ended(50, LEASE)}
    assert ended[waiting.ready.request.generation_id] == "cancelled"
    assert running.ready.request.generation_id not in ended


async def test_what_is_past_its_deadline_is_only_ended(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    new = new_job(provider, deadline=timedelta(seconds=-1))
    await add(bus, new)
    assert await store.claim(provider, 1, LEASE) == []
    ended = {item.job.generation_id: item.reason for item in await store.claim_ended(50, LEASE)}
    assert ended[new.ready.request.generation_id] == "expired"


async def test_a_job_that_kills_its_workers_is_given_up(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    new = new_job(provider)
    await add(bus, new)
    for _ in range(MAXIMUM_LAPSES):
        assert len(await store.claim(provider, 1, AT_ONCE)) == 1
    assert await store.claim(provider, 1, AT_ONCE) == []
    ended = {item.job.generation_id: item.reason for item in await store.claim_ended(50, LEASE)}
    assert ended[new.ready.request.generation_id] == "abandoned"


async def test_postponing_spends_no_lapse(store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs) -> None:
    await add(bus, new_job(provider))
    for attempt in range(1, MAXIMUM_LAPSES + 3):
        (job,) = await store.claim(provider, 1, LEASE)
        assert job.attempt == attempt
        await store.postpone(job, AT_ONCE)
    (job,) = await store.claim(provider, 1, LEASE)
    await store.postpone(job, LEASE)
    assert await store.claim(provider, 1, LEASE) == []


async def test_the_tenant_with_fewer_running_jobs_comes_first(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    await add(bus, *(new_job(provider, tenant_id="greedy") for _ in range(4)), new_job(provider, tenant_id="modest"))
    order = [(await store.claim(provider, 1, LEASE))[0].tenant_id for _ in range(3)]
    assert order == ["greedy", "modest", "greedy"]


async def test_a_flood_that_came_first_does_not_starve_another_tenant(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    """One slot: each job ends before the next is claimed, so that nobody ever has running ones."""
    await add(bus, *(new_job(provider, tenant_id="flood") for _ in range(6)))
    turns = []
    for turn in range(5):
        if turn == 1:
            await add(bus, new_job(provider, tenant_id="patient"), new_job(provider, tenant_id="patient"))
        (job,) = await store.claim(provider, 1, LEASE)
        turns.append(job.tenant_id)
        await store.finish(job, failed(job.generation_id, job.attempt, Progress(), CANCELLED))
    assert turns == ["flood", "patient", "flood", "patient", "flood"]


async def test_one_claim_of_many_slots_is_shared_and_no_tenant_gets_more_than_its_share(
    store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs
) -> None:
    await add(bus, *(new_job(provider, tenant_id="flood") for _ in range(10)), new_job(provider, tenant_id="patient"))
    claimed = await store.claim(provider, 4, LEASE, TenantShares(3, {}))
    assert sorted(job.tenant_id for job in claimed) == ["flood", "flood", "flood", "patient"]
    assert await store.claim(provider, 4, LEASE, TenantShares(3, {"flood": 3, "patient": 1})) == []
    assert len(await store.claim(provider, 4, LEASE, TenantShares(3, {"flood": 2}))) == 1


async def test_old_rows_are_deleted(store: PostgresJobStore, bus: DatabaseTransactions, provider: str, new_job: NewJobs) -> None:
    new = new_job(provider)
    await cancel(bus, new)
    await store.purge(timedelta(hours=1))
    assert await add(bus, new) == ["cancelled_before"]
    assert await store.purge(AT_ONCE) >= 1
    assert await add(bus, new) == ["added"]


async def test_a_commit_wakes_the_workers(database: Database, bus: DatabaseTransactions, provider: str, new_job: NewJobs) -> None:
    signals, stopping = Signals(), asyncio.Event()
    lane = signals.lane(provider)
    listening = asyncio.create_task(JobListener(database, signals).run(stopping))
    async with asyncio.timeout(10):
        await lane.wait()
        lane.clear()
        new = new_job(provider)
        await add(bus, new)
        await lane.wait()
        signals.ended.clear()
        await cancel(bus, new)
        await signals.ended.wait()
        stopping.set()
        await listening


async def test_a_lost_connection_is_told(database: Database) -> None:
    listening = asyncio.create_task(JobListener(database, Signals()).run(asyncio.Event()))

    async def ended() -> bool:
        async with database.transaction() as connection:
            query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%tessera_generator_jobs%'"
            return bool(await connection.scalar(text(query)))

    await eventually(ended)
    with pytest.raises(Exception, match="listens for jobs was lost"):
        await asyncio.wait_for(listening, 10)


async def test_client_roles_cannot_read_jobs(database: Database, bus: DatabaseTransactions, provider: str, new_job: NewJobs) -> None:
    await add(bus, new_job(provider))
    async with database.reading("acme") as connection:
        with pytest.raises(Exception, match="permission denied"):
            await connection.execute(text("SELECT count(*) FROM generation_job"))
