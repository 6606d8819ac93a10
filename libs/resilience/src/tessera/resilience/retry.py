"""Repeating a call that failed for a passing reason, with growing and scattered pauses (tenacity)."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import tenacity

_RANDOM = random.SystemRandom()

Retryable = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently."""

    attempts: int | None = 3
    """All calls together, the first included; None never gives up."""
    initial: timedelta = timedelta(milliseconds=100)
    """The pause after the first failure; it doubles with each further one."""
    maximum: timedelta = timedelta(seconds=10)
    """No pause is longer."""
    jitter: float = 0.5
    """Share of the pause that is random: 0 none, 1 anything between nothing and the whole pause."""

    def __post_init__(self) -> None:
        if (
            (self.attempts is not None and self.attempts < 1)
            or not 0 <= self.jitter <= 1
            or self.initial < timedelta(0)
            or self.maximum < self.initial
        ):
            raise ValueError(f"not a retry policy: {self}")

    def pause(self, failures: int) -> timedelta:
        """How long to wait after this many failures in a row (1 or more)."""
        # Beyond 2^40 every pause has long reached the maximum, and larger powers overflow timedelta.
        whole = min(self.maximum.total_seconds(), self.initial.total_seconds() * 2 ** min(failures - 1, 40))
        return timedelta(seconds=whole * (1 - self.jitter * _RANDOM.random()))


def retrying(policy: RetryPolicy, retry_on: Retryable) -> tenacity.AsyncRetrying:
    """A tenacity controller: `await retrying(policy, SomeError)(function, *arguments)`, or `async for attempt in …: with attempt: …`.

    Repeats on exceptions of the type(s), or for which the predicate holds, and raises the last one when the attempts are used up. Waits
    with asyncio.sleep; cancellation always goes through.
    """
    return tenacity.AsyncRetrying(
        retry=_condition(retry_on),
        stop=tenacity.stop_never if policy.attempts is None else tenacity.stop_after_attempt(policy.attempts),
        wait=lambda state: policy.pause(state.attempt_number).total_seconds(),
        reraise=True,
    )


def _condition(retry_on: Retryable) -> tenacity.retry_base:
    if isinstance(retry_on, type | tuple):
        return tenacity.retry_if_exception_type(retry_on)
    return tenacity.retry_if_exception(retry_on)
