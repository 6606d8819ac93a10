"""The loops that run jobs from their rows: one lane per engine, and one that ends what will not run any more."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Any, Final

from tessera.contracts import GenerationCompleted, GenerationFailed, GenerationParameters, Problem, RetryableError, Usage
from tessera.generator.conventions import named, observe
from tessera.generator.domain.endings import (
    ABANDONED,
    CANCELLED,
    EXPIRED,
    GenerationCancelledError,
    GenerationInterruptedError,
    LeaseLostError,
    completed,
    failed,
    problem_of,
    usage_of,
)
from tessera.generator.domain.policies import WorkerPolicy
from tessera.generator.domain.prompts import grounding
from tessera.generator.domain.transcript import Transcript
from tessera.generator.ports import ChunkSink, EndedJob, Engine, Job, JobStore, TenantShares, TokenCounter
from tessera.generator.speaking import Speaker
from tessera.resilience import CircuitOpenError, RetryPolicy, deadline, retrying
from tessera.telemetry import bound, continued, get_logger, metrics, span

_log = get_logger(__name__)

_REASONS: Final[dict[str, Problem]] = {"cancelled": CANCELLED, "expired": EXPIRED, "abandoned": ABANDONED}

_RENEW_AGAIN: Final = timedelta(seconds=1)
"""After a lease could not be renewed: the reason to look (a cancellation) may be there still."""
_FINISHING: Final = RetryPolicy(attempts=5, initial=timedelta(milliseconds=200), maximum=timedelta(seconds=2))
"""A finished generation was paid for: a short trouble of the store must not lose it."""


def _passing(error: BaseException) -> bool:
    return isinstance(error, RetryableError | CircuitOpenError) and not isinstance(error, LeaseLostError)


def _count(engine: Engine, outcome: str) -> None:
    metrics.GENERATIONS_ENDED.labels(provider=engine.name, outcome=outcome).inc()


def transcript_of(parameters: GenerationParameters) -> Transcript:
    """An empty one. An echoed prompt may hold a stop sequence without ending anything: there the provider alone looks for them."""
    stops = () if parameters.extra.get("echo") else parameters.stop
    return Transcript(stops, parameters.n or 1)


class Signals:
    """Wakes loops of this process; a signal that nobody waits for is kept until somebody does."""

    def __init__(self) -> None:
        self._ready: dict[str, asyncio.Event] = {}
        self._running: dict[tuple[str, str], asyncio.Event] = {}
        self.ended = asyncio.Event()

    def lane(self, provider: str) -> asyncio.Event:
        """Set when a job of the provider may be due."""
        return self._ready.setdefault(provider, asyncio.Event())

    def running(self, job: Job) -> asyncio.Event:
        """Set when the state of a running job has changed."""
        return self._running.setdefault((job.tenant_id, job.generation_id), asyncio.Event())

    def forget(self, job: Job) -> None:
        """The job no longer runs here."""
        self._running.pop((job.tenant_id, job.generation_id), None)

    def job_ready(self, provider: str) -> None:
        """A job of the provider was added."""
        self.lane(provider).set()

    def job_cancelled(self, tenant_id: str, generation_id: str) -> None:
        """A job was cancelled, here or elsewhere."""
        running = self._running.get((tenant_id, generation_id))
        if running is not None:
            running.set()
        self.ended.set()

    def everything(self) -> None:
        """Signals may have been missed: look at all."""
        for event in (*self._ready.values(), *self._running.values(), self.ended):
            event.set()


async def first_of(limit: timedelta, *events: asyncio.Event) -> None:
    """Returns when an event is set or the time is up, whichever comes first."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=limit.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


class JobRunner:
    """Runs one attempt of one job, from its lease to its end."""

    def __init__(self, store: JobStore, sink: ChunkSink, counter: TokenCounter, signals: Signals, policy: WorkerPolicy) -> None:
        self._store = store
        self._sink = sink
        self._counter = counter
        self._signals = signals
        self._policy = policy

    async def run(self, job: Job, engine: Engine) -> None:
        """Runs the job to an end, a postponement or the loss of its lease. Raises only CancelledError, after giving the job back."""
        with (
            bound(request_id=job.origin.request_id, tenant_id=job.tenant_id),
            continued(job.origin.traceparent),
            span("generation.run", generation_id=job.generation_id, provider=engine.name, attempt=job.attempt, **named(job)),
            metrics.GENERATIONS_RUNNING.labels(provider=engine.name).track_inprogress(),
            metrics.GENERATION_SECONDS.labels(provider=engine.name).time(),
        ):
            try:
                await self._attempt(job, engine)
            except CircuitOpenError as error:
                _count(engine, "postponed")
                await self._give_back(job, error.retry_after)
            except LeaseLostError as error:
                _count(engine, error.code)
                _log.warning("generation_lease_lost", generation_id=job.generation_id, attempt=job.attempt)
            except RetryableError as error:
                # Nothing could be said about the job: its lease lapses, and whoever can use the store takes it over.
                _count(engine, error.code)
                _log.warning("generation_left_to_lapse", generation_id=job.generation_id, error=error.message)
            except asyncio.CancelledError:
                await asyncio.shield(self._give_back(job, timedelta(0)))
                raise

    async def _attempt(self, job: Job, engine: Engine) -> None:
        speaker = Speaker(job, engine, self._store, self._sink, self._policy.coalesce)
        transcript = transcript_of(job.ready.request.parameters)
        event: GenerationCompleted | GenerationFailed
        began = time.monotonic()
        try:
            event = await self._held(job, self._generate(job, engine, speaker, transcript))
        except (CircuitOpenError, RetryableError):
            raise
        # The border of a job: whatever went wrong inside, the asker is told that it did.
        except Exception as error:  # noqa: BLE001
            event = await self._failure(job, engine, speaker, transcript, error)
        await retrying(_FINISHING, _passing)(self._store.finish, job, event)
        outcome = "completed" if isinstance(event, GenerationCompleted) else event.problem.code
        _count(engine, outcome)
        observe(job, event, time.monotonic() - began)
        _log.info("generation_ended", generation_id=job.generation_id, attempt=job.attempt, outcome=outcome)

    async def _generate(self, job: Job, engine: Engine, speaker: Speaker, transcript: Transcript) -> GenerationCompleted:
        if job.progress.started and not engine.deterministic:
            raise GenerationInterruptedError("its worker was lost after the first chunk.")
        async with deadline(job.deadline):
            await speaker.say(engine.generate(job), transcript)
            usage = await self._usage(job, engine, transcript)
        return completed(job.ready, job.attempt, speaker.progress, transcript, usage)

    async def _failure(self, job: Job, engine: Engine, speaker: Speaker, transcript: Transcript, error: Exception) -> GenerationFailed:
        problem = problem_of(error)
        log = _log.exception if problem.code == "internal_error" else _log.warning
        log("generation_failed", generation_id=job.generation_id, attempt=job.attempt, code=problem.code)
        usage = await self._usage(job, engine, transcript) if transcript.started else None
        return failed(job.generation_id, job.attempt, speaker.progress, problem, usage)

    async def _usage(self, job: Job, engine: Engine, transcript: Transcript) -> Usage:
        encoding_name = job.ready.request.model.encoding
        completion = sum([await self._counter.count(encoding_name, choice.text) for choice in transcript.choices])
        before = await self._counter.count(encoding_name, grounding(job.ready.memories)) if engine.shows_memories else 0
        return usage_of(job.ready, transcript, completion, before)

    async def _held(self, job: Job, work: Coroutine[Any, Any, GenerationCompleted]) -> GenerationCompleted:
        """The result of the work, as long as the lease is held. Raises LeaseLostError or GenerationCancelledError, with the work ended."""
        working = asyncio.create_task(work)
        holding = asyncio.create_task(self._hold(job))
        try:
            await asyncio.wait({working, holding}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await holding
            return await working
        finally:
            for task in (working, holding):
                task.cancel()
            await asyncio.gather(working, holding, return_exceptions=True)
            self._signals.forget(job)

    async def _hold(self, job: Job) -> None:
        """Prolongs the lease until it is lost or the job cancelled; a store that cannot be reached is asked again."""
        changed, pause = self._signals.running(job), self._policy.heartbeat
        while True:
            await first_of(pause, changed)
            changed.clear()
            try:
                state = await self._store.renew(job, self._policy.lease)
            except (RetryableError, CircuitOpenError) as error:
                _log.warning("generation_lease_not_renewed", generation_id=job.generation_id, error=str(error))
                pause = min(self._policy.heartbeat, _RENEW_AGAIN)
                continue
            pause = self._policy.heartbeat
            if state == "cancelled":
                raise GenerationCancelledError
            if state == "lost":
                raise LeaseLostError(f"the lease of generation {job.generation_id} is lost")

    async def _give_back(self, job: Job, delay: timedelta) -> None:
        try:
            await self._store.postpone(job, delay)
        except (RetryableError, CircuitOpenError) as error:
            _log.warning("generation_left_to_lapse", generation_id=job.generation_id, error=str(error))


class Lane:
    """Claims the jobs of one engine and runs as many at once as the engine allows."""

    def __init__(self, engine: Engine, store: JobStore, runner: JobRunner, signals: Signals, policy: WorkerPolicy) -> None:
        self._engine = engine
        self._store = store
        self._runner = runner
        self._policy = policy
        self._wake = signals.lane(engine.name)
        self._running: dict[asyncio.Task[None], str] = {}
        """The tenant of each job that runs here."""
        self._some_may_wait = True
        """Whether the last look for jobs may have left some that are due."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping` is set, then finishes what is in hand; cancelled, it gives the jobs back first."""
        try:
            while not stopping.is_set():
                await self._turn(stopping)
            await self._finish()
        finally:
            for task in self._running:
                task.cancel()
            await self._finish()

    async def _turn(self, stopping: asyncio.Event) -> None:
        self._wake.clear()
        for job in await self._claim():
            self._start(job)
        await first_of(max(self._policy.poll, self._engine.suspended), self._wake, stopping)

    async def _claim(self) -> Sequence[Job]:
        free = self._engine.concurrency - len(self._running)
        self._some_may_wait = True  # also while it is being looked
        if free <= 0 or self._engine.suspended:
            return ()
        try:
            shares = TenantShares(self._policy.tenant_limit(self._engine.concurrency), Counter(self._running.values()))
            jobs = await self._store.claim(self._engine.name, free, self._policy.lease, shares)
        except (RetryableError, CircuitOpenError) as error:
            _log.warning("generation_claim_failed", provider=self._engine.name, error=str(error))
        except Exception:  # noqa: BLE001
            # The lane would end, and give back what runs: no generation may pay for what is wrong with a look for more.
            _log.exception("generation_claim_failed", provider=self._engine.name)
        else:
            running = Counter(shares.running) + Counter(job.tenant_id for job in jobs)
            self._some_may_wait = len(jobs) >= free or any(held >= shares.limit for held in running.values())
            return jobs
        return ()

    def _start(self, job: Job) -> None:
        task = asyncio.create_task(self._runner.run(job, self._engine), name=f"generation {job.generation_id}")
        self._running[task] = job.tenant_id
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A free slot may take a job that was left waiting, where one may have been."""
        self._running.pop(task, None)
        if self._some_may_wait:
            self._wake.set()
        if not task.cancelled() and task.exception() is not None:
            _log.error("generation_worker_failed", task=task.get_name(), exc_info=task.exception())

    async def _finish(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)


class Closer:
    """Ends jobs that will not run any more, also those of providers that no replica serves, and deletes old rows."""

    LIMIT = 50

    def __init__(self, store: JobStore, signals: Signals, policy: WorkerPolicy) -> None:
        self._store = store
        self._ended = signals.ended
        self._policy = policy

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping` is set."""
        while not stopping.is_set():
            self._ended.clear()
            try:
                for ended in await self._store.claim_ended(self.LIMIT, self._policy.lease):
                    await self._close(ended)
                await self._store.purge(self._policy.keep_finished)
            except (RetryableError, CircuitOpenError) as error:
                _log.warning("generation_closing_failed", error=str(error))
            await first_of(self._policy.poll, self._ended, stopping)

    async def _close(self, ended: EndedJob) -> None:
        job = ended.job
        with bound(request_id=job.origin.request_id, tenant_id=job.tenant_id), continued(job.origin.traceparent):
            await self._store.finish(job, failed(job.generation_id, job.attempt, job.progress, _REASONS[ended.reason]))
            _log.info("generation_closed", generation_id=job.generation_id, reason=ended.reason)
