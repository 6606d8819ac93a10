"""Validations, one at a time: read in a thread, judge in a thread, keep the lease meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from tessera.bus import faults
from tessera.contracts.errors import InvalidError, Problem, RetryableError
from tessera.contracts.events import ValidationReport
from tessera.resilience import Breaker, CircuitOpenError, RetryPolicy
from tessera.telemetry import bound, continued, get_logger, span
from tessera.validator.domain.verdict import judge, judge_alone
from tessera.validator.ports import DatasetReader, Job, Lease, LeaseLostError, LoadedCandidate, ValidationJobs

JUDGED_BEFORE_COMMIT: Final = "validation_judged_before_commit"
"""Crash point of this service (profile test only)."""

_BACKOFF: Final = RetryPolicy(initial=timedelta(seconds=1), maximum=timedelta(seconds=30))
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ValidationPacing:
    """How patiently validations run."""

    poll: timedelta = timedelta(milliseconds=250)
    """Pause when nothing is due."""
    prolong_every: timedelta = timedelta(seconds=10)
    """Well under the lease."""
    attempts: int = 3
    """Leases that come to nothing before a validation fails: a dataset that kills the process is not tried forever."""
    backoff: RetryPolicy = _BACKOFF


class ValidationWorker:
    """Takes due validations one at a time. Several workers may run: a lease decides who works, a fence what counts."""

    def __init__(self, jobs: ValidationJobs, reader: DatasetReader, objects: Breaker, pacing: ValidationPacing) -> None:
        self._jobs = jobs
        self._reader = reader
        self._objects = objects
        self._pacing = pacing

    def pace(self, pacing: ValidationPacing) -> None:
        """Goes on at another pace."""
        self._pacing = pacing

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until `stopping` is set; the validation in hand is finished. Never raises for one validation's sake."""
        failures = 0
        while not stopping.is_set():
            try:
                lease = await self._claim()
                failures = 0
            except (RetryableError, CircuitOpenError) as error:
                failures += 1
                _log.warning("validations cannot be claimed", error=str(error))
                await _wait(stopping, self._pacing.backoff.pause(failures))
                continue
            if lease is None:
                await _wait(stopping, self._pacing.poll)
            else:
                await self.work(lease)

    async def _claim(self) -> Lease | None:
        """An open breaker before the object store claims nothing, so that waiting for it spends no attempts."""
        if self._objects.state == "open":
            return None
        return await self._jobs.claim()

    async def work(self, lease: Lease) -> None:
        """Works on one validation until it ends, fails or is put off."""
        origin, validation_id = lease.job.origin, lease.job.validation_id
        with bound(request_id=origin.request_id, tenant_id=origin.tenant_id), continued(origin.traceparent), span("validator.validate"):
            try:
                await self._attempt(lease)
            except LeaseLostError:
                _log.info("validation taken over by another worker, or cancelled", validation_id=validation_id)
            except InvalidError as error:
                _log.info("validation failed", validation_id=validation_id, code=error.code)
                await self._fail(lease, Problem.of(error))
            except (RetryableError, CircuitOpenError) as error:
                _log.warning("validation interrupted, will be tried again", validation_id=validation_id, error=str(error))
                await self._put_off(lease, spent=False)
            except Exception:  # noqa: BLE001 - one bad job must not stop the others; it is logged and its attempt counted
                _log.exception("validation broke", validation_id=validation_id, attempts=lease.attempts)
                await self._put_off(lease, spent=True)

    async def _attempt(self, lease: Lease) -> None:
        if lease.attempts > self._pacing.attempts:
            message = f"The validation broke {self._pacing.attempts} times in a row; see the logs of this request."
            raise InvalidError("validation_broke", message)
        report = await self._kept(lease, self._judged(lease.job))
        faults.reach(JUDGED_BEFORE_COMMIT)
        await self._jobs.complete(lease, report)
        _log.info("validation completed", validation_id=lease.job.validation_id, verdict=report.verdict)

    async def _judged(self, job: Job) -> ValidationReport:
        _check_owner(job)
        datasets = [job.candidate] if job.reference is None else [job.candidate, job.reference]
        async with self._reader.loading(datasets) as loaded:
            if isinstance(loaded, LoadedCandidate):
                return judge_alone(loaded.rows, loaded.columns)
        with span("validator.judge"):
            return await asyncio.to_thread(judge, loaded.comparison, loaded.doubts)

    async def _kept(self, lease: Lease, work: Coroutine[Any, Any, ValidationReport]) -> ValidationReport:
        """The work's result, with the lease prolonged meanwhile. Raises LeaseLostError as soon as that fails, with the work given up."""
        working, keeping = asyncio.create_task(work), asyncio.create_task(self._keep(lease))
        try:
            await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await keeping
            return await working
        finally:
            for task in (working, keeping):
                task.cancel()
            await asyncio.gather(working, keeping, return_exceptions=True)

    async def _keep(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(self._pacing.prolong_every.total_seconds())
            try:
                await self._jobs.prolong(lease)
            except LeaseLostError:
                raise
            except (RetryableError, CircuitOpenError) as error:
                _log.warning("lease not prolonged", validation_id=lease.job.validation_id, error=str(error))

    async def _fail(self, lease: Lease, problem: Problem) -> None:
        """Where even this fails, the lease lapses and the next worker fails it."""
        with suppress(RetryableError, CircuitOpenError):
            await self._jobs.fail(lease, problem)

    async def _put_off(self, lease: Lease, *, spent: bool) -> None:
        """A dependency that is away spends no attempt. Where even this fails, the lease lapses by itself."""
        with suppress(RetryableError, CircuitOpenError):
            await self._jobs.put_off(lease, self._pacing.backoff.pause(lease.attempts), spent=spent)


def _check_owner(job: Job) -> None:
    """Datasets lie under their tenant's name; another tenant's are never opened, whoever asks."""
    for dataset in (job.candidate, job.reference):
        if dataset is not None and not dataset.object_key.startswith(f"datasets/{job.tenant_id}/"):
            raise InvalidError("dataset_not_found", f"There is no dataset {dataset.dataset_id!r}.")


async def _wait(stopping: asyncio.Event, pause: timedelta) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), pause.total_seconds())
