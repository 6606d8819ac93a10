"""The validation worker against jobs kept in memory; the object store, its breaker, DuckDB and the judgement are real."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from tessera.bus import Origin
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import DatasetReference, ValidationReport
from tessera.resilience import Breaker, RetryPolicy
from tessera.storage import ObjectStore, ObjectStoreSettings
from tessera.testkit.waiting import eventually
from tessera.validator.adapters.datasets import DuckDbReader, ReadingLimits
from tessera.validator.ports import Job, Lease, LeaseLostError
from tessera.validator.workers import ValidationPacing, ValidationWorker

pytestmark = pytest.mark.unit

SHORT = timedelta(milliseconds=1)
DATA = "a,b\n" + "\n".join(f"{left},{right}" for left, right in np.random.default_rng(0).standard_normal((60, 2)).tolist())
PACING = ValidationPacing(poll=SHORT, prolong_every=SHORT, backoff=RetryPolicy(initial=SHORT, maximum=SHORT))


@dataclass
class FakeJobs:
    """One validation."""

    job: Job
    attempts: int = 0
    claims: int = 0
    prolonged: int = 0
    report: ValidationReport | None = None
    problem: Problem | None = None
    failures: list[Exception] = field(default_factory=list)
    """Raised by the next completions, one each."""
    unavailable: list[Exception] = field(default_factory=list)
    """Raised by the next claims, one each."""

    @property
    def over(self) -> bool:
        return self.report is not None or self.problem is not None

    async def claim(self) -> Lease | None:
        await asyncio.sleep(0)  # as a database would, let others run
        if self.unavailable:
            raise self.unavailable.pop()
        if self.over:
            return None
        self.attempts += 1
        self.claims += 1
        return Lease(self.job, self.claims, self.attempts)

    async def prolong(self, lease: Lease) -> None:
        self.prolonged += 1

    async def complete(self, lease: Lease, report: ValidationReport) -> None:
        if self.failures:
            raise self.failures.pop()
        self.report = report

    async def fail(self, lease: Lease, problem: Problem) -> None:
        self.problem = problem

    async def put_off(self, lease: Lease, delay: timedelta, *, spent: bool) -> None:
        self.attempts -= 0 if spent else 1


@dataclass
class Bench:
    """A worker with what it works on."""

    folder: Path
    jobs: FakeJobs
    breaker: Breaker
    worker: ValidationWorker
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def until_over(self) -> FakeJobs:
        running = asyncio.create_task(self.worker.run(self.stopping))
        await eventually(lambda: self.jobs.over)
        self.stopping.set()
        await asyncio.wait_for(running, 5)
        return self.jobs


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    folder = tmp_path / "objects"
    objects = ObjectStore(ObjectStoreSettings(url=folder.as_uri(), breaker_failure_threshold=2, breaker_reset_seconds=1))
    digest = hashlib.sha256(DATA.encode()).hexdigest()
    key = f"datasets/t/{digest}.csv"
    await objects.put(key, DATA.encode())
    dataset = DatasetReference(dataset_id="d", object_key=key, format="csv", size_bytes=len(DATA), sha256=digest)
    jobs = FakeJobs(Job("t", "v", dataset, None, Origin("t", "parent")))
    worker = ValidationWorker(jobs, DuckDbReader(objects, ReadingLimits(), tmp_path), objects.breaker, PACING)
    return Bench(folder, jobs, objects.breaker, worker)


async def test_a_candidate_alone_is_reviewed(bench: Bench) -> None:
    jobs = await bench.until_over()
    assert jobs.report is not None
    assert (jobs.report.verdict, jobs.report.candidate_rows) == ("review", 60)


async def test_the_lease_is_kept_while_it_judges(bench: Bench) -> None:
    bench.jobs.job = replace(bench.jobs.job, reference=bench.jobs.job.candidate)
    jobs = await bench.until_over()
    assert jobs.report is not None
    assert (jobs.report.verdict, jobs.prolonged > 0) == ("reject", True)


async def test_an_object_store_that_is_away_opens_its_breaker_delays_and_recovers(bench: Bench) -> None:
    """No attempt is spent, nothing fails, and while the breaker is open nothing is claimed."""
    away = bench.folder.with_name("away")
    bench.folder.rename(away)
    bench.folder.write_text("a file where a folder was")
    running = asyncio.create_task(bench.worker.run(bench.stopping))
    await eventually(lambda: bench.breaker.state == "open")
    assert (bench.jobs.claims, bench.jobs.attempts) == (2, 0)
    bench.folder.unlink()
    away.rename(bench.folder)
    await eventually(lambda: bench.jobs.over)
    bench.stopping.set()
    await asyncio.wait_for(running, 5)
    assert (bench.jobs.report is not None, bench.breaker.state) == (True, "closed")


async def test_another_tenants_dataset_is_not_opened(bench: Bench) -> None:
    bench.jobs.job = replace(bench.jobs.job, tenant_id="u")
    jobs = await bench.until_over()
    assert jobs.problem is not None
    assert jobs.problem.code == "dataset_not_found"


async def test_what_breaks_every_time_is_given_up(bench: Bench) -> None:
    bench.jobs.failures = [ValueError("broken")] * 9
    jobs = await bench.until_over()
    assert jobs.problem is not None
    assert (jobs.problem.code, jobs.claims) == ("validation_broke", PACING.attempts + 1)


async def test_a_worker_takes_another_pace_up(bench: Bench) -> None:
    bench.jobs.failures = [ValueError("broken")] * 9
    bench.worker.pace(replace(PACING, attempts=1))
    assert (await bench.until_over()).claims == 2


async def test_storage_that_is_away_delays_and_spends_no_attempt(bench: Bench) -> None:
    bench.jobs.unavailable = [RetryableError("away")] * 3
    bench.jobs.failures = [RetryableError("away")] * 5
    assert (await bench.until_over()).report is not None


async def test_a_lost_lease_is_left_to_its_new_holder(bench: Bench) -> None:
    bench.jobs.failures = [LeaseLostError("taken over")]
    assert (await bench.until_over()).report is not None
