"""Rows of sweeps on a real Postgres: whose turn it is, one holder at a time, every step fenced, cancelled at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tessera.bus import Origin, Transaction
from tessera.contracts.events import RetentionPolicy, SweepReported
from tessera.retention.adapters.jobs import PostgresSweepJobs
from tessera.retention.adapters.postgres import PostgresUnit
from tessera.retention.handlers import CANCELLED
from tessera.retention.ports import Lease, LeaseLostError, Sweep
from tessera.retention.workers import SweepPacing, SweepWorker
from tessera.storage import Database
from tessera.testkit import eventually
from tessera.testkit.plugin import DatabaseFactory

pytestmark = pytest.mark.integration

LEASE, AT_ONCE = timedelta(hours=1), timedelta(0)


class Transactions:
    """The bus's transactions without its relay."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def transaction(self, origin: Origin) -> AsyncIterator[Transaction]:
        async with self._database.transaction() as connection:
            yield Transaction(connection, origin, "retention", [])


class Table:
    """The table of sweeps as handlers and workers use it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._bus = Transactions(database)

    def jobs(self, lease: timedelta = LEASE) -> PostgresSweepJobs:
        return PostgresSweepJobs(self._database, self._bus, lease)  # type: ignore[arg-type]

    @asynccontextmanager
    async def unit(self, tenant_id: str) -> AsyncIterator[PostgresUnit]:
        async with self._bus.transaction(Origin(tenant_id, "parent")) as transaction:
            yield PostgresUnit(transaction)

    async def add(self, tenant_id: str, count: int = 1) -> list[str]:
        names = [str(uuid4()) for _ in range(count)]
        for name in names:
            async with self.unit(tenant_id) as unit:
                await unit.sweeps.add(_sweep(tenant_id, name))
        return names

    async def cancel(self, tenant_id: str, name: str) -> SweepReported | None:
        async with self.unit(tenant_id) as unit:
            await unit.sweeps.cancel(tenant_id, name, CANCELLED)
        return await self.report(tenant_id, name)

    async def report(self, tenant_id: str, name: str) -> SweepReported | None:
        async with self.unit(tenant_id) as unit:
            return await unit.sweeps.report(tenant_id, name, after=None, limit=10)


def _sweep(tenant_id: str, name: str) -> Sweep:
    return Sweep(
        tenant_id=tenant_id,
        sweep_id=name,
        dry_run=True,
        plan_id=None,
        state="running",
        policy_version=1,
        policy=RetentionPolicy(max_age_days=1),
        as_of=datetime.now(UTC),
        origin=Origin(tenant_id, name),
    )


@pytest.fixture(scope="module")
def prepared(postgres_database: DatabaseFactory) -> Any:
    return postgres_database("retention")


@pytest.fixture
async def table(prepared: Any) -> AsyncIterator[Table]:
    database = Database("retention", prepared.settings("retention"))
    yield Table(database)
    async with database.transaction() as connection:
        await connection.execute(text("UPDATE sweeps SET state = 'failed', finished_at = now(), claimed_at = NULL"))
    await database.close()


async def claimed(jobs: PostgresSweepJobs) -> Lease:
    lease = await jobs.claim()
    assert lease is not None
    return lease


async def finish(jobs: PostgresSweepJobs, lease: Lease) -> None:
    async with jobs.step(lease) as step:
        await step.finish("planned")


async def test_a_flood_of_one_tenant_does_not_starve_another(table: Table) -> None:
    await table.add("flood", 10)
    jobs = table.jobs()
    await claimed(jobs)
    await table.add("patient", 2)
    turns = []
    for _ in range(4):
        lease = await claimed(jobs)
        turns.append(lease.tenant_id)
        await finish(jobs, lease)
    assert turns == ["patient", "flood", "patient", "flood"]


async def test_a_sweep_that_gives_way_comes_again_after_the_others(table: Table) -> None:
    await table.add("large")
    jobs = table.jobs()
    large = await claimed(jobs)
    await table.add("small")
    async with jobs.step(large) as step:
        await step.pause(AT_ONCE)
    turns = []
    for _ in range(2):
        lease = await claimed(jobs)
        turns.append(lease.tenant_id)
        await finish(jobs, lease)
    assert turns == ["small", "large"]


async def test_a_zombies_step_fails_once_its_sweep_was_taken_over(table: Table) -> None:
    await table.add("acme")
    zombie = await claimed(table.jobs(AT_ONCE))
    successor = await claimed(table.jobs())
    assert (successor.sweep_id, successor.fence) == (zombie.sweep_id, zombie.fence + 1)
    with pytest.raises(LeaseLostError):
        await finish(table.jobs(), zombie)
    await finish(table.jobs(), successor)


async def test_cancelled_before_during_and_after(table: Table) -> None:
    before, during, after = await table.add("acme", 3)
    told = await table.cancel("acme", before)
    assert told is not None
    assert (told.state, told.problem) == ("failed", CANCELLED)
    leases = [await claimed(table.jobs()) for _ in range(2)]
    assert {lease.sweep_id for lease in leases} == {during, after}
    held, finished = sorted(leases, key=lambda lease: lease.sweep_id != during)
    await finish(table.jobs(), finished)
    await table.cancel("acme", during)
    with pytest.raises(LeaseLostError):
        await finish(table.jobs(), held)
    ended = await table.cancel("acme", after)
    assert ended is not None
    assert (ended.state, ended.problem) == ("planned", None)
    assert await table.cancel("stranger", before) is None


async def test_a_cancelled_sweep_is_left_by_its_worker(table: Table) -> None:
    (name,) = await table.add("acme")
    lease = await claimed(table.jobs())
    await table.cancel("acme", name)
    worker = SweepWorker(table.jobs(), SweepPacing())
    await asyncio.wait_for(worker.work(lease, asyncio.Event()), 30)

    async def told() -> bool:
        report = await table.report("acme", name)
        return report is not None and report.problem == CANCELLED

    await eventually(told)
