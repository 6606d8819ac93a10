"""Jobs run to exactly one end, at most so many at once, whatever the engine or the store does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tessera.contracts import GenerationCompleted, GenerationFailed, Problem, RetryableError
from tessera.generator.domain.endings import EngineError, LeaseLostError
from tessera.generator.domain.pieces import Piece
from tessera.generator.domain.policies import WorkerPolicy
from tessera.generator.domain.prompts import grounding
from tessera.generator.domain.transcript import Chunk, Progress
from tessera.generator.ports import EndedJob, Job, LeaseState, TenantShares
from tessera.generator.workers import Closer, JobRunner, Lane, Signals
from tessera.resilience import CircuitOpenError
from tessera.testkit import eventually

pytestmark = pytest.mark.unit
LeaseJob = Callable[..., Job]
POLICY = WorkerPolicy(lease=timedelta(seconds=0.3), poll=timedelta(seconds=0.05), coalesce=timedelta(seconds=0.02))
PATIENT = replace(POLICY, poll=timedelta(minutes=1))
"""Nothing is found by looking now and then."""
Script = Sequence[Piece | Exception | float]


@dataclass
class Store:
    """A JobStore in memory."""

    due: list[Job] = field(default_factory=list)
    ended: list[EndedJob] = field(default_factory=list)
    state: LeaseState = "held"
    renewed: int = 0
    recorded: list[Progress] = field(default_factory=list)
    postponed: list[timedelta] = field(default_factory=list)
    finished: list[GenerationCompleted | GenerationFailed] = field(default_factory=list)
    troubles: list[Exception] = field(default_factory=list)
    purged: int = 0
    looks: int = 0

    def _trouble(self) -> None:
        if self.troubles:
            raise self.troubles.pop(0)

    async def claim(self, provider: str, limit: int, lease: timedelta, shares: TenantShares | None = None) -> Sequence[Job]:
        self._trouble()
        self.looks += 1
        claimed, self.due = self.due[:limit], self.due[limit:]
        return claimed

    async def claim_ended(self, limit: int, lease: timedelta) -> Sequence[EndedJob]:
        self._trouble()
        claimed, self.ended = self.ended[:limit], self.ended[limit:]
        return claimed

    async def renew(self, job: Job, lease: timedelta) -> LeaseState:
        self._trouble()
        self.renewed += 1
        return self.state

    async def record(self, job: Job, progress: Progress) -> None:
        if self.state == "lost":
            raise LeaseLostError("lost")
        self.recorded.append(progress)

    async def postpone(self, job: Job, delay: timedelta) -> None:
        self._trouble()
        self.postponed.append(delay)

    async def finish(self, job: Job, event: GenerationCompleted | GenerationFailed) -> None:
        self._trouble()
        self.finished.append(event)

    async def purge(self, finished_before: timedelta) -> int:
        self.purged += 1
        return 0


@dataclass
class Sink:
    chunks: list[Chunk] = field(default_factory=list)

    async def send(self, job: Job, chunk: Chunk) -> None:
        self.chunks.append(chunk)


class Words:
    async def count(self, encoding_name: str, text: str) -> int:
        return len(text.split())


@dataclass
class Engine:
    """Says its script: pieces, pauses in seconds, errors."""

    script: Script = ()
    name: str = "up"
    concurrency: int = 2
    deterministic: bool = False
    shows_memories: bool = True
    suspended: timedelta = timedelta(0)
    running: int = 0
    most_running: int = 0
    closed: int = 0

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Piece):
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.running -= 1
            self.closed += 1


@dataclass
class Bench:
    store: Store = field(default_factory=Store)
    sink: Sink = field(default_factory=Sink)
    signals: Signals = field(default_factory=Signals)

    @property
    def runner(self) -> JobRunner:
        return JobRunner(self.store, self.sink, Words(), self.signals, POLICY)

    async def run(self, engine: Engine, job: Job) -> Any:
        """The event that ended the job; None where it did not end."""
        await self.runner.run(job, engine)
        assert len(self.store.finished) <= 1
        return self.store.finished[0] if self.store.finished else None

    @asynccontextmanager
    async def lane(self, engine: Engine, policy: WorkerPolicy = POLICY) -> AsyncIterator[asyncio.Event]:
        """A running lane; it is stopped and waited for at the end of the block."""
        stopping = asyncio.Event()
        running = asyncio.create_task(Lane(engine, self.store, self.runner, self.signals, policy).run(stopping))
        yield stopping
        stopping.set()
        await asyncio.wait_for(running, 5)


@pytest.fixture
def bench() -> Bench:
    return Bench()


STOP = Piece(finish_reason="stop")


async def test_the_first_piece_is_sent_at_once_and_the_rest_in_few_chunks(bench: Bench, leased_job: LeaseJob) -> None:
    words = [step for _ in range(30) for step in (Piece("a "), 0.002)]
    end = await bench.run(Engine([*words, STOP]), leased_job("up"))
    assert bench.sink.chunks[0].text == "a "
    assert len(bench.sink.chunks) < 15
    assert "".join(chunk.text for chunk in bench.sink.chunks) == end.text == "a " * 30
    assert (end.last_index, end.usage.completion_tokens) == (bench.sink.chunks[-1].index, 30)


async def test_deltas_travel_with_their_chunk_and_in_the_end(bench: Bench, leased_job: LeaseJob) -> None:
    call = {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}
    end = await bench.run(Engine([Piece(delta=call), Piece(finish_reason="tool_calls")]), leased_job("up"))
    assert (bench.sink.chunks[0].delta, end.message, end.finish_reason) == (call, call, "tool_calls")


async def test_only_the_first_chunk_of_a_provider_is_recorded(bench: Bench, leased_job: LeaseJob) -> None:
    await bench.run(Engine([Piece("a"), 0.03, Piece("b"), 0.03, STOP]), leased_job("up"))
    assert (len(bench.sink.chunks), len(bench.store.recorded)) == (2, 1)


async def test_every_chunk_of_a_deterministic_engine_is_recorded_before_it_is_sent(bench: Bench, leased_job: LeaseJob) -> None:
    await bench.run(Engine([Piece("a"), 0.03, Piece("b"), 0.03, STOP], deterministic=True), leased_job("up"))
    assert [progress.text for progress in bench.store.recorded] == ["a", "ab"]


async def test_a_resumed_generation_repeats_its_last_chunk_and_goes_on(bench: Bench, leased_job: LeaseJob) -> None:
    job = leased_job("up", attempt=2, progress=Progress(1, 2, "one"))
    end = await bench.run(Engine([Piece("on"), Piece("e tw"), Piece("o"), STOP], deterministic=True), job)
    assert bench.sink.chunks[0] == Chunk(1, 2, "e")
    assert [(chunk.index, chunk.text_offset) for chunk in bench.sink.chunks[1:]] == [(2, 3), (3, 6)]
    assert (end.text, end.last_index, end.attempt) == ("one two", 3, 2)


async def test_an_engine_that_now_says_something_else_is_not_trusted(bench: Bench, leased_job: LeaseJob) -> None:
    job = leased_job("up", attempt=2, progress=Progress(0, 0, "one"))
    end = await bench.run(Engine([Piece("two"), STOP], deterministic=True), job)
    assert end.problem.code == "generation_interrupted"


async def test_a_provider_that_was_cut_is_not_called_again(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([Piece("x"), STOP])
    end = await bench.run(engine, leased_job("up", attempt=2, progress=Progress(0, 0, "one")))
    assert (end.problem.code, engine.closed) == ("generation_interrupted", 0)


async def test_an_error_keeps_what_was_said_before(bench: Bench, leased_job: LeaseJob) -> None:
    problem = Problem(code="provider_error", message="No.", status=502)
    end = await bench.run(Engine([Piece("half a"), Piece(" word"), EngineError(problem)]), leased_job("up"))
    assert "".join(chunk.text for chunk in bench.sink.chunks) == "half a word"
    assert (end.problem, end.usage.completion_tokens, end.last_index) == (problem, 3, bench.sink.chunks[-1].index)


def told(name: str, job: Job, **labels: str) -> float:
    model = job.ready.request.model
    known = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": model.provider, "gen_ai_request_model": model.model_id}
    return REGISTRY.get_sample_value(name, {**known, **labels}) or 0.0


async def test_what_an_attempt_took_and_used_is_measured_as_the_conventions_say(bench: Bench, leased_job: LeaseJob) -> None:
    job = leased_job("up")
    tokens, seconds = "gen_ai_client_token_usage_sum", "gen_ai_client_operation_duration_seconds_count"
    before = [told(tokens, job, gen_ai_token_type=kind) for kind in ("input", "output")]
    well, ill = told(seconds, job, error_type=""), told(seconds, job, error_type="provider_error")
    end = await bench.run(Engine([Piece("one two"), STOP]), job)
    await Bench().run(Engine([EngineError(Problem(code="provider_error", message="No.", status=502))]), job)
    after = [told(tokens, job, gen_ai_token_type=kind) for kind in ("input", "output")]
    assert [new - old for new, old in zip(after, before, strict=True)] == [end.usage.prompt_tokens, end.usage.completion_tokens]
    assert (told(seconds, job, error_type=""), told(seconds, job, error_type="provider_error")) == (well + 1, ill + 1)


async def test_memories_before_the_prompt_are_counted_as_an_estimate(bench: Bench, leased_job: LeaseJob) -> None:
    job = leased_job("up", memories=[("m1", "The key is here.")])
    end = await bench.run(Engine([Piece("ok"), STOP]), job)
    assert (end.usage.prompt_tokens, end.usage.source) == (7 + len(grounding(job.ready.memories).split()), "estimated")


async def test_an_unforeseen_error_is_told_without_its_words(bench: Bench, leased_job: LeaseJob) -> None:
    end = await bench.run(Engine([ZeroDivisionError("secret")]), leased_job("up"))
    assert end.problem.code == "internal_error"
    assert "secret" not in end.problem.message


async def test_an_open_breaker_postpones(bench: Bench, leased_job: LeaseJob) -> None:
    assert await bench.run(Engine([CircuitOpenError("up", timedelta(seconds=7))]), leased_job("up")) is None
    assert bench.store.postponed == [timedelta(seconds=7)]


async def test_a_store_in_trouble_leaves_the_job_to_lapse(bench: Bench, leased_job: LeaseJob) -> None:
    assert await bench.run(Engine([RetryableError("no store")]), leased_job("up")) is None
    assert bench.store.postponed == []


async def test_finishing_survives_a_short_trouble_of_the_store(bench: Bench, leased_job: LeaseJob) -> None:
    bench.store.troubles = [RetryableError("one"), CircuitOpenError("postgres", timedelta(0))]
    assert (await bench.run(Engine([Piece("paid for"), STOP]), leased_job("up"))).text == "paid for"


async def test_a_cancellation_stops_the_engine_at_once(bench: Bench, leased_job: LeaseJob) -> None:
    engine, job = Engine([Piece("said before"), 60.0]), leased_job("up")
    running = asyncio.create_task(bench.run(engine, job))
    await eventually(lambda: bench.sink.chunks)
    bench.store.state = "cancelled"
    bench.signals.job_cancelled(job.tenant_id, job.generation_id)
    end = await asyncio.wait_for(running, 5)
    assert (end.problem.code, end.usage.completion_tokens, engine.running) == ("generation_cancelled", 2, 0)


async def test_a_lost_lease_says_nothing_more(bench: Bench, leased_job: LeaseJob) -> None:
    bench.store.state = "lost"
    engine = Engine([60.0])
    assert await bench.run(engine, leased_job("up")) is None
    assert engine.running == 0


@pytest.mark.parametrize("trouble", [RetryableError("down for a moment"), CircuitOpenError("postgres", timedelta(seconds=1))])
async def test_the_lease_is_renewed_through_troubles(bench: Bench, leased_job: LeaseJob, trouble: Exception) -> None:
    bench.store.troubles = [trouble]
    assert (await bench.run(Engine([0.35, Piece("slow"), STOP]), leased_job("up"))).text == "slow"
    assert bench.store.renewed >= 1


async def test_the_deadline_ends_it(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([Piece("a"), 60.0])
    end = await bench.run(engine, leased_job("up", deadline=timedelta(seconds=0.1)))
    assert (end.problem.code, engine.running) == ("deadline_exceeded", 0)


async def test_a_stop_sequence_closes_the_engine(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([Piece("one E"), Piece("ND two"), 60.0])
    end = await bench.run(engine, leased_job("up", parameters={"stop": ("END",)}))
    assert (end.text, end.finish_reason, engine.running) == ("one ", "stop", 0)


async def test_a_lane_runs_no_more_than_its_engine_allows(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([0.05, Piece("x"), STOP])
    bench.store.due = [leased_job("up") for _ in range(7)]
    async with bench.lane(engine):
        await eventually(lambda: len(bench.store.finished) == 7)
    assert engine.most_running == engine.concurrency


async def test_a_lane_is_woken_by_a_signal(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([Piece("x"), STOP])
    async with bench.lane(engine):
        bench.store.due = [leased_job("up")]
        bench.signals.job_ready("up")
        await eventually(lambda: bench.store.finished)


async def test_the_end_of_a_job_makes_room_for_one_that_was_left_waiting(bench: Bench, leased_job: LeaseJob) -> None:
    bench.store.due = [leased_job("up") for _ in range(7)]
    async with bench.lane(Engine([0.01, Piece("x"), STOP], concurrency=3), PATIENT):
        await eventually(lambda: len(bench.store.finished) == 7)


async def test_the_end_of_a_job_is_no_reason_to_look_where_nothing_waited(bench: Bench, leased_job: LeaseJob) -> None:
    bench.store.due = [leased_job("up")]
    engine = Engine([Piece("x"), STOP], concurrency=4)
    async with bench.lane(engine, PATIENT):
        await eventually(lambda: bench.store.finished)
        bench.store.due = [leased_job("up")]
        bench.signals.job_ready("up")
        await eventually(lambda: len(bench.store.finished) == 2)
    assert bench.store.looks == 2


async def test_a_suspended_lane_claims_nothing(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([Piece("x"), STOP], suspended=timedelta(seconds=0.1))
    bench.store.due = [leased_job("up")]
    async with bench.lane(engine):
        bench.signals.job_ready("up")
        await eventually(lambda: not bench.signals.lane("up").is_set())  # the lane has looked
        assert bench.store.due
        engine.suspended = timedelta(0)
        await eventually(lambda: bench.store.finished)


async def test_a_lane_outlives_a_store_in_trouble(bench: Bench, leased_job: LeaseJob) -> None:
    bench.store.troubles = [RetryableError("no store"), CircuitOpenError("postgres", timedelta(0))]
    bench.store.due = [leased_job("up")]
    async with bench.lane(Engine([Piece("x"), STOP])):
        await eventually(lambda: bench.store.finished)


async def test_a_stopping_lane_finishes_what_is_in_hand(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([0.1, Piece("x"), STOP])
    bench.store.due = [leased_job("up") for _ in range(3)]
    async with bench.lane(engine) as stopping:
        await eventually(lambda: engine.running == 2)
        stopping.set()
    assert (len(bench.store.finished), len(bench.store.due)) == (2, 1)


async def test_a_cancelled_lane_gives_its_jobs_back(bench: Bench, leased_job: LeaseJob) -> None:
    engine = Engine([60.0])
    bench.store.due = [leased_job("up")]
    lane = Lane(engine, bench.store, bench.runner, bench.signals, POLICY)
    running = asyncio.create_task(lane.run(asyncio.Event()))
    await eventually(lambda: engine.running == 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (bench.store.postponed, engine.running) == ([timedelta(0)], 0)


async def test_what_will_not_run_is_told(bench: Bench, leased_job: LeaseJob) -> None:
    bench.store.ended = [EndedJob(leased_job("up"), reason) for reason in ("cancelled", "expired", "abandoned")]
    bench.store.troubles = [RetryableError("no store")]
    stopping = asyncio.Event()
    closing = asyncio.create_task(Closer(bench.store, bench.signals, POLICY).run(stopping))
    await eventually(lambda: len(bench.store.finished) == 3)
    stopping.set()
    await asyncio.wait_for(closing, 5)
    codes = [event.problem.code for event in bench.store.finished if isinstance(event, GenerationFailed)]
    assert codes == ["generation_cancelled", "expired", "generation_abandoned"]
    assert bench.store.purged >= 1


def test_signals_wake_everyone_after_a_reconnect(leased_job: LeaseJob) -> None:
    signals, job = Signals(), leased_job("up")
    lane, running = signals.lane("up"), signals.running(job)
    signals.everything()
    assert lane.is_set()
    assert running.is_set()
    assert signals.ended.is_set()
    signals.forget(job)
    signals.job_cancelled(job.tenant_id, job.generation_id)


def test_the_default_policy_forgives_two_missed_heartbeats() -> None:
    assert WorkerPolicy().heartbeat * 3 == WorkerPolicy().lease


@pytest.mark.parametrize(
    ("concurrency", "share", "limit"), [(32, 0.75, 24), (4, 0.75, 3), (2, 0.75, 1), (1, 0.75, 1), (3, 1.0, 3), (8, 0.01, 1)]
)
def test_one_slot_at_least_stays_for_other_tenants(concurrency: int, share: float, limit: int) -> None:
    assert WorkerPolicy(tenant_share=share).tenant_limit(concurrency) == limit
