"""Sweeps, step by step: each step is one short transaction under a lease, so a killed worker loses at most one step."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from tessera.bus import faults
from tessera.contracts.errors import Problem, RetryableError
from tessera.resilience import CircuitOpenError, RetryPolicy
from tessera.retention.domain import MAXIMUM_ARCHIVE_CHUNK, archive_chunk, due
from tessera.retention.ports import Lease, LeaseLostError, SweepJobs, SweepStep
from tessera.telemetry import bound, continued, get_logger, span

PLANNED_BEFORE_COMMIT: Final = "sweep_planned_before_commit"
ASKED_BEFORE_COMMIT: Final = "sweep_asked_before_commit"
"""Crash points of this service (profile test only)."""

_PAGE: Final = 1_000
_STEPS_IN_TURN: Final = 10
"""A large sweep makes room for other tenants' after so many."""
_BACKOFF: Final = RetryPolicy(initial=timedelta(seconds=1), maximum=timedelta(seconds=30))
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SweepPacing:
    """How patiently sweeps run."""

    poll: timedelta = timedelta(milliseconds=250)
    """Pause when nothing is due, and between looks at unconfirmed items."""
    confirmation: timedelta = timedelta(hours=1)
    """How long memory may take to answer the last request before the sweep fails."""
    attempts: int = 5
    """Failing leases in a row before the sweep fails."""
    backoff: RetryPolicy = _BACKOFF


class SweepWorker:
    """Takes due sweeps one at a time. Several workers may run: a lease decides who works, a fence what counts."""

    def __init__(self, jobs: SweepJobs, pacing: SweepPacing) -> None:
        self._jobs = jobs
        self._pacing = pacing

    def pace(self, pacing: SweepPacing) -> None:
        """Goes on at another pace."""
        self._pacing = pacing

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until `stopping` is set; the step in hand is finished. Never raises for one sweep's sake."""
        failures = 0
        while not stopping.is_set():
            try:
                lease = await self._jobs.claim()
                failures = 0
            except (RetryableError, CircuitOpenError) as error:
                failures += 1
                _log.warning("sweeps cannot be claimed", error=str(error))
                await _wait(stopping, self._pacing.backoff.pause(failures))
                continue
            if lease is None:
                await _wait(stopping, self._pacing.poll)
            else:
                await self.work(lease, stopping)

    async def work(self, lease: Lease, stopping: asyncio.Event) -> None:
        """Works on one sweep until it waits, ends, fails, `stopping` is set, or it is another tenant's turn."""
        origin = lease.origin
        with bound(request_id=origin.request_id, tenant_id=origin.tenant_id), continued(origin.traceparent), span("retention.sweep"):
            try:
                for _ in range(_STEPS_IN_TURN):
                    if not await self._advance(lease):
                        return
                    if stopping.is_set():
                        break
                await self._give_back(lease)
            except LeaseLostError:
                _log.info("sweep taken over by another worker, or cancelled", sweep_id=lease.sweep_id)
            except (RetryableError, CircuitOpenError) as error:
                _log.warning("sweep interrupted, will go on", sweep_id=lease.sweep_id, error=str(error))
                await self._put_off(lease, spent=False)
            except Exception:  # noqa: BLE001 - one bad job must not stop the others; it is logged and its attempt counted
                _log.exception("sweep step failed", sweep_id=lease.sweep_id, attempts=lease.attempts)
                await self._put_off(lease, spent=True)

    async def _advance(self, lease: Lease) -> bool:
        """One step. Whether another may follow at once."""
        async with self._jobs.step(lease) as step:
            if lease.attempts > self._pacing.attempts:
                message = f"The sweep failed {self._pacing.attempts} times in a row; see the logs of this request."
                await step.finish("failed", Problem(code="sweep_failed", message=message))
                return False
            if not step.sweep.planned:
                return await _plan(step)
            if step.sweep.requested_at is None:
                return await _ask(step)
            return await self._confirm(step, step.sweep.requested_at)

    async def _confirm(self, step: SweepStep, requested_at: datetime) -> bool:
        unconfirmed = await step.unconfirmed()
        if unconfirmed == 0:
            await step.finish("completed")
        elif datetime.now(UTC) - requested_at > self._pacing.confirmation:
            message = f"memory did not answer for {unconfirmed} items within {self._pacing.confirmation}."
            await step.finish("failed", Problem(code="confirmation_overdue", message=message))
        else:
            await step.pause(self._pacing.poll)
        return False

    async def _give_back(self, lease: Lease) -> None:
        """Due again at once, behind the sweeps of tenants that were served longer ago."""
        async with self._jobs.step(lease) as step:
            await step.pause(timedelta(0))

    async def _put_off(self, lease: Lease, *, spent: bool) -> None:
        """A dependency that is away spends no attempt. Where even this fails, the lease lapses by itself."""
        with suppress(RetryableError, CircuitOpenError):
            async with self._jobs.step(lease) as step:
                await step.pause(self._pacing.backoff.pause(lease.attempts), spent=spent)


async def _plan(step: SweepStep) -> bool:
    """Names one page of memories."""
    sweep = step.sweep
    if sweep.policy is None:
        items = list(await step.named_by_plan(_PAGE))
        cursor = items[-1].memory.memory_id if len(items) == _PAGE else None
    else:
        memories = await step.memories(_PAGE)
        items = list(due(memories, sweep.policy, sweep.as_of))
        cursor = memories[-1].memory_id if len(memories) == _PAGE else None
    await step.plan(items, cursor=cursor)
    faults.reach(PLANNED_BEFORE_COMMIT)
    if cursor is None and sweep.dry_run:
        await step.finish("planned")
        return False
    return True


async def _ask(step: SweepStep) -> bool:
    """Asks memory for one chunk of what was named and has not changed since."""
    items = await step.open_items(MAXIMUM_ARCHIVE_CHUNK)
    chunk = archive_chunk(items)
    await step.ask(chunk.requested, chunk.skipped, last=len(items) < MAXIMUM_ARCHIVE_CHUNK)
    faults.reach(ASKED_BEFORE_COMMIT)
    return True


async def _wait(stopping: asyncio.Event, pause: timedelta) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), pause.total_seconds())
