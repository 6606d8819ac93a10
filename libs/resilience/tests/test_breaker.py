import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tessera.resilience import Breaker, BreakerState, CircuitOpenError

pytestmark = pytest.mark.unit

THRESHOLD = 3
RESET = timedelta(seconds=10)


class DownError(Exception):
    """The dependency failed."""


class RefusedError(Exception):
    """The dependency works and says no."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """A breaker with a clock of its own, whose calls end when and how the test says."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.changes: list[BreakerState] = []
        self.breaker = Breaker(
            "thing", failure_threshold=THRESHOLD, reset_after=RESET, failures=(DownError,), on_change=self._changed, clock=self.clock
        )

    def _changed(self, name: str, state: BreakerState) -> None:
        assert name == "thing"
        self.changes.append(state)

    @property
    def state(self) -> str:
        return self.breaker.state

    async def call(self, error: BaseException | None = None) -> str:
        async def answer() -> str:
            if error is not None:
                raise error
            return "answer"

        return await self.breaker.call(answer)

    async def fail(self, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(DownError):
                await self.call(DownError())

    def begin(self) -> "Guarded":
        return Guarded(self.breaker)

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds


class Guarded:
    """One call in progress; begun by `await begun()`, ended by `end`."""

    def __init__(self, breaker: Breaker) -> None:
        self._guard = breaker.guard()

    async def begun(self) -> "Guarded":
        await self._guard.__aenter__()
        return self

    async def end(self, error: BaseException | None = None) -> None:
        swallowed = await self._guard.__aexit__(type(error) if error else None, error, None)
        assert not swallowed


@pytest.fixture
def calls() -> Calls:
    return Calls()


async def test_passes_answers_and_errors_through(calls: Calls) -> None:
    assert await calls.call() == "answer"
    with pytest.raises(RefusedError):
        await calls.call(RefusedError())


async def test_opens_after_as_many_failures_in_a_row_as_the_threshold(calls: Calls) -> None:
    await calls.fail(THRESHOLD - 1)
    assert calls.state == "closed"
    await calls.fail()
    assert calls.state == "open"
    assert calls.changes == ["open"]


@pytest.mark.parametrize("answer", [None, RefusedError()])
async def test_an_answer_between_failures_starts_the_count_again(calls: Calls, answer: Exception | None) -> None:
    await calls.fail(THRESHOLD - 1)
    if answer is None:
        await calls.call()
    else:
        with pytest.raises(RefusedError):
            await calls.call(answer)
    await calls.fail(THRESHOLD - 1)
    assert calls.state == "closed"


async def test_open_calls_nothing_and_says_when_to_come_back(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(4)
    with pytest.raises(CircuitOpenError, match="thing") as raised:
        await calls.call(AssertionError("must not be called"))
    assert (raised.value.name, raised.value.retry_after) == ("thing", timedelta(seconds=6))


async def test_is_half_open_when_the_time_has_come(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    assert calls.state == "half_open"
    assert calls.breaker.retry_after == timedelta(0)


async def test_a_good_probe_closes(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    assert await calls.call() == "answer"
    assert calls.state == "closed"
    assert calls.changes == ["open", "half_open", "closed"]


async def test_a_refusal_by_the_dependency_is_a_good_probe(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    with pytest.raises(RefusedError):
        await calls.call(RefusedError())
    assert calls.state == "closed"


async def test_a_bad_probe_opens_for_the_whole_time_again(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    await calls.fail()
    calls.wait(9.9)
    assert calls.state == "open"


async def test_half_open_lets_exactly_one_through(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    probe = await calls.begin().begun()
    for _ in range(5):
        with pytest.raises(CircuitOpenError):
            await calls.call()
    await probe.end()
    assert await calls.call() == "answer"


async def test_one_probe_of_many_real_tasks(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    inside = 0

    async def slow() -> None:
        nonlocal inside
        inside += 1
        await asyncio.sleep(0.01)

    outcomes = await asyncio.gather(*(calls.breaker.call(slow) for _ in range(20)), return_exceptions=True)
    assert inside == 1
    assert sum(isinstance(outcome, CircuitOpenError) for outcome in outcomes) == 19


async def test_cancellation_counts_as_nothing(calls: Calls) -> None:
    await calls.fail(THRESHOLD - 1)
    for _ in range(5):
        with pytest.raises(asyncio.CancelledError):
            await calls.call(asyncio.CancelledError())
    assert calls.state == "closed"
    await calls.fail()
    assert calls.state == "open"


async def test_a_cancelled_probe_makes_room_for_the_next(calls: Calls) -> None:
    await calls.fail(THRESHOLD)
    calls.wait(10)
    probe = asyncio.create_task(calls.breaker.call(asyncio.sleep, 60))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert calls.state == "half_open"
    assert await calls.call() == "answer"


async def test_an_open_breaker_inside_says_nothing_about_this_one(calls: Calls) -> None:
    for _ in range(THRESHOLD + 1):
        with pytest.raises(CircuitOpenError):
            await calls.call(CircuitOpenError("another", timedelta(seconds=1)))
    assert calls.state == "closed"


async def test_stragglers_change_nothing(calls: Calls) -> None:
    good, bad = [await calls.begin().begun() for _ in range(2)]
    await calls.fail(THRESHOLD)
    await good.end()
    assert calls.state == "open"
    calls.wait(10)
    probe = await calls.begin().begun()
    await bad.end(DownError())
    assert calls.state == "half_open"
    await probe.end()
    assert calls.state == "closed"


async def test_the_default_counts_every_exception() -> None:
    breaker = Breaker("thing", failure_threshold=1)
    with pytest.raises(KeyError):
        async with breaker.guard():
            raise KeyError
    assert breaker.state == "open"


def test_a_threshold_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="failure_threshold"):
        Breaker("thing", failure_threshold=0)


class Model(RuleBasedStateMachine):
    """Random histories of concurrent calls, compared with the rules as one would write them on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.calls = Calls()
        self.running: list[tuple[Guarded, int]] = []
        self.epoch = 0  # changes of state so far
        self.state = "closed"
        self.failures = 0
        self.opened_at = 0.0
        self.probing = False

    def teardown(self) -> None:
        for call, _ in self.running:
            self.loop.run_until_complete(call.end(asyncio.CancelledError()))
        self.loop.close()

    def expected(self) -> str:
        if self.state == "open" and self.calls.clock.now >= self.opened_at + RESET.total_seconds():
            return "half_open"
        return self.state

    def become(self, state: str) -> None:
        self.state, self.epoch, self.probing, self.failures = state, self.epoch + 1, False, 0
        if state == "open":
            self.opened_at = self.calls.clock.now

    @rule()
    def begin(self) -> None:
        admitted = self.expected() == "closed" or (self.expected() == "half_open" and not self.probing)
        try:
            call = self.loop.run_until_complete(self.calls.begin().begun())
        except CircuitOpenError:
            assert not admitted
            return
        assert admitted
        if self.expected() == "half_open":
            if self.state == "open":
                self.become("half_open")
            self.probing = True
        self.running.append((call, self.epoch))

    @precondition(lambda self: self.running)
    @rule(
        which=st.integers(min_value=0),
        error=st.sampled_from([None, DownError(), DownError(), RefusedError(), asyncio.CancelledError(), CircuitOpenError("x", RESET)]),
    )
    def end(self, which: int, error: BaseException | None) -> None:
        call, epoch = self.running.pop(which % len(self.running))
        self.loop.run_until_complete(call.end(error))
        if epoch != self.epoch:
            return
        if isinstance(error, asyncio.CancelledError | CircuitOpenError):
            self.probing = False
        elif isinstance(error, DownError):
            self.failures += 1
            if self.state == "half_open" or self.failures >= THRESHOLD:
                self.become("open")
        elif self.state == "half_open":
            self.become("closed")
        else:
            self.failures = 0

    @rule(seconds=st.sampled_from([0.5, 5.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.calls.wait(seconds)

    @invariant()
    def agrees(self) -> None:
        assert self.calls.state == self.expected()
        assert len(self.calls.changes) == self.epoch

    @invariant()
    def never_two_probes(self) -> None:
        if self.state == "half_open":
            assert sum(epoch == self.epoch for _, epoch in self.running) <= 1


TestModel = Model.TestCase


@given(failures=st.lists(st.booleans(), max_size=40))
def test_closed_as_long_as_failures_never_come_in_a_row_of_the_threshold(failures: list[bool]) -> None:
    async def history() -> None:
        calls, row, opened = Calls(), 0, False
        for failed in failures:
            if opened:
                assert calls.state == "open"
                return
            if failed:
                await calls.fail()
            else:
                await calls.call()
            row = row + 1 if failed else 0
            opened = row == THRESHOLD
        assert calls.state == ("open" if opened else "closed")

    asyncio.run(history())
