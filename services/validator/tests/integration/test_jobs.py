"""Rows of validations on a real Postgres: whose turn it is, one holder at a time, every write fenced, cancelled at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tessera.bus import Origin, Transaction
from tessera.contracts.errors import Problem
from tessera.contracts.events import DatasetReference, ValidationReport, ValidationReported
from tessera.storage import Database
from tessera.testkit.plugin import DatabaseFactory
from tessera.validator.adapters.postgres import PostgresUnit, PostgresValidationJobs
from tessera.validator.handlers import CANCELLED
from tessera.validator.ports import Job, Lease, LeaseLostError

pytestmark = pytest.mark.integration

LEASE, AT_ONCE = timedelta(hours=1), timedelta(0)
DATASET = DatasetReference(dataset_id="d", object_key="datasets/t/d.csv", format="csv", size_bytes=1, sha256="0" * 64)
REPORT = ValidationReport(verdict="review", reasons=("none",), evidence=(), candidate_rows=1, columns=("a",))
PROBLEM = Problem(code="broken", message="It broke.")


class Transactions:
    """The bus's transactions without its relay: what would be published is kept."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.published: list[Any] = []

    @asynccontextmanager
    async def transaction(self, origin: Origin) -> AsyncIterator[Transaction]:
        rows: list[Any] = []
        async with self._database.transaction() as connection:
            yield Transaction(connection, origin, "validator", rows)
        self.published += rows


class Table:
    """The table of validations, emptied, as handlers and workers use it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.bus = Transactions(database)

    def jobs(self, lease: timedelta = LEASE, tenant_limit: int = 100) -> PostgresValidationJobs:
        return PostgresValidationJobs(self._database, self.bus, lease, tenant_limit)  # type: ignore[arg-type]

    @asynccontextmanager
    async def unit(self, tenant_id: str) -> AsyncIterator[PostgresUnit]:
        async with self.bus.transaction(Origin(tenant_id, "parent")) as transaction:
            yield PostgresUnit(transaction)

    async def add(self, tenant_id: str, count: int = 1) -> list[str]:
        names = [str(uuid4()) for _ in range(count)]
        for name in names:
            async with self.unit(tenant_id) as unit:
                assert await unit.add(Job(tenant_id, name, DATASET, None, Origin(tenant_id, name)), datetime.now(UTC))
        return names

    async def cancel(self, tenant_id: str, name: str) -> ValidationReported | None:
        async with self.unit(tenant_id) as unit:
            await unit.cancel(tenant_id, name, CANCELLED)
        return await self.report(tenant_id, name)

    async def report(self, tenant_id: str, name: str) -> ValidationReported | None:
        async with self.unit(tenant_id) as unit:
            return await unit.report(tenant_id, name)


@pytest.fixture(scope="module")
def prepared(postgres_database: DatabaseFactory) -> Any:
    return postgres_database("validator")


@pytest.fixture
async def table(prepared: Any) -> AsyncIterator[Table]:
    database = Database("validator", prepared.settings("validator"))
    yield Table(database)
    async with database.transaction() as connection:
        await connection.execute(text("UPDATE validations SET state = 'failed', finished_at = now(), claimed_at = NULL"))
    await database.close()


async def claimed(jobs: PostgresValidationJobs) -> Lease:
    lease = await jobs.claim()
    assert lease is not None
    return lease


async def test_a_flood_of_one_tenant_does_not_starve_another(table: Table) -> None:
    await table.add("flood", 20)
    jobs = table.jobs()
    first = await claimed(jobs)
    assert first.job.tenant_id == "flood"
    await table.add("patient", 2)
    turns = []
    for _ in range(4):
        lease = await claimed(jobs)
        turns.append(lease.job.tenant_id)
        await jobs.fail(lease, PROBLEM)
    assert turns == ["patient", "flood", "patient", "flood"]


async def test_one_tenant_holds_no_more_leases_than_it_may(table: Table) -> None:
    await table.add("flood", 10)
    jobs = table.jobs(tenant_limit=2)
    taken = [lease for lease in await asyncio.gather(*(jobs.claim() for _ in range(8))) if lease is not None]
    assert len(taken) == 2
    await table.add("other")
    assert (await claimed(jobs)).job.tenant_id == "other"
    assert await jobs.claim() is None
    await jobs.fail(taken[0], PROBLEM)
    assert (await claimed(jobs)).job.tenant_id == "flood"


async def test_many_workers_never_share_a_job(table: Table) -> None:
    names = await table.add("many", 12)
    jobs = table.jobs()
    taken = [lease for lease in await asyncio.gather(*(jobs.claim() for _ in range(20))) if lease is not None]
    assert sorted(lease.job.validation_id for lease in taken) == sorted(names)


WRITES: dict[str, Callable[[PostgresValidationJobs, Lease], Awaitable[None]]] = {
    "prolong": lambda jobs, lease: jobs.prolong(lease),
    "put_off": lambda jobs, lease: jobs.put_off(lease, LEASE, spent=True),
    "complete": lambda jobs, lease: jobs.complete(lease, REPORT),
    "fail": lambda jobs, lease: jobs.fail(lease, PROBLEM),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_zombies_write_fails_once_its_job_was_taken_over(table: Table, write: str) -> None:
    await table.add("acme")
    zombie = await claimed(table.jobs(AT_ONCE))
    successor = await claimed(table.jobs())
    assert (successor.job.validation_id, successor.fence) == (zombie.job.validation_id, zombie.fence + 1)
    with pytest.raises(LeaseLostError):
        await WRITES[write](table.jobs(), zombie)
    await table.jobs().complete(successor, REPORT)
    assert len(table.bus.published) == 1


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_fails_once_the_job_was_cancelled(table: Table, write: str) -> None:
    (name,) = await table.add("acme")
    lease = await claimed(table.jobs())
    told = await table.cancel("acme", name)
    assert told is not None
    assert (told.state, told.problem) == ("failed", CANCELLED)
    with pytest.raises(LeaseLostError):
        await WRITES[write](table.jobs(), lease)
    assert await table.report("acme", name) == told
    assert not table.bus.published


async def test_cancelled_before_anybody_took_it_it_never_runs(table: Table) -> None:
    (name,) = await table.add("acme")
    await table.cancel("acme", name)
    assert await table.jobs().claim() is None


async def test_cancelled_after_its_end_it_stays_as_it_ended(table: Table) -> None:
    (name,) = await table.add("acme")
    await table.jobs().complete(await claimed(table.jobs()), REPORT)
    told = await table.cancel("acme", name)
    assert told is not None
    assert (told.state, told.report) == ("completed", REPORT)


async def test_another_tenants_validation_cannot_be_cancelled(table: Table) -> None:
    (name,) = await table.add("acme")
    assert await table.cancel("stranger", name) is None
    told = await table.report("acme", name)
    assert told is not None
    assert told.state == "queued"
