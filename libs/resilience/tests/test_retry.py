import asyncio
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.resilience import RetryPolicy, retrying

pytestmark = pytest.mark.unit

QUICK = RetryPolicy(attempts=3, initial=timedelta(milliseconds=1), maximum=timedelta(milliseconds=2))


class PassingError(Exception):
    """Worth another try."""


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, failures: int, error: type[BaseException] = PassingError) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    async def __call__(self, word: str) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return word


async def test_repeats_until_it_works() -> None:
    flaky = Flaky(2)
    assert await retrying(QUICK, PassingError)(flaky, "word") == "word"
    assert flaky.calls == 3


async def test_the_last_error_is_raised_when_the_attempts_are_used_up() -> None:
    flaky = Flaky(9)
    with pytest.raises(PassingError):
        await retrying(QUICK, PassingError)(flaky, "word")
    assert flaky.calls == 3


@pytest.mark.parametrize("error", [KeyError, asyncio.CancelledError])
async def test_other_errors_and_cancellation_are_not_repeated(error: type[BaseException]) -> None:
    flaky = Flaky(9, error)
    with pytest.raises(error):
        await retrying(QUICK, (PassingError, TimeoutError))(flaky, "word")
    assert flaky.calls == 1


async def test_a_predicate_decides() -> None:
    flaky = Flaky(2, KeyError)
    await retrying(QUICK, lambda error: isinstance(error, LookupError))(flaky, "word")
    assert flaky.calls == 3


async def test_without_a_limit_it_goes_on() -> None:
    flaky = Flaky(20)
    await retrying(RetryPolicy(attempts=None, initial=timedelta(0), maximum=timedelta(0)), PassingError)(flaky, "word")
    assert flaky.calls == 21


async def test_as_a_loop() -> None:
    tries = 0
    async for attempt in retrying(QUICK, PassingError):
        with attempt:
            tries += 1
            if tries < 3:
                raise PassingError
    assert tries == 3


policies = st.builds(
    RetryPolicy,
    attempts=st.none() | st.integers(1, 10),
    initial=st.timedeltas(timedelta(0), timedelta(seconds=1)),
    maximum=st.timedeltas(timedelta(seconds=1), timedelta(days=1)),
    jitter=st.floats(0, 1),
)


@given(policy=policies, failures=st.integers(1, 10_000))
def test_pauses_stay_between_their_bounds(policy: RetryPolicy, failures: int) -> None:
    whole = min(policy.maximum.total_seconds(), policy.initial.total_seconds() * 2.0 ** min(failures - 1, 100))
    pause = policy.pause(failures).total_seconds()
    assert whole * (1 - policy.jitter) - 1e-5 <= pause <= whole + 1e-5


def test_without_jitter_pauses_double_up_to_the_maximum() -> None:
    policy = RetryPolicy(initial=timedelta(seconds=1), maximum=timedelta(seconds=5), jitter=0)
    assert [policy.pause(failures).total_seconds() for failures in (1, 2, 3, 4)] == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"jitter": 1.1}, {"jitter": -0.1}, {"initial": timedelta(seconds=-1)}, {"initial": timedelta(hours=1)}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a retry policy"):
        RetryPolicy(**wrong)  # type: ignore[arg-type]
