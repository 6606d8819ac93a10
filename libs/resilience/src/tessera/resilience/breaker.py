"""A circuit breaker for async code.

pybreaker keeps the state and decides the transitions. Its own async support needs tornado and lets every caller through when half open, so
the calls are made here and only their outcomes are told to it. (Pattern: M. T. Nygard, Release It!, 2nd edition, chapter 5.)
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Literal, ParamSpec, TypeVar

import pybreaker

from tessera.resilience.errors import CircuitOpenError

BreakerState = Literal["closed", "open", "half_open"]
"""`half_open`: the next call is let through as the one probe."""

P = ParamSpec("P")
R = TypeVar("R")

_STATES: dict[str, BreakerState] = {pybreaker.STATE_CLOSED: "closed", pybreaker.STATE_OPEN: "open", pybreaker.STATE_HALF_OPEN: "half_open"}


class Breaker:
    """Stops calling a dependency after `failure_threshold` failures in a row, and tries again with one probe after `reset_after`.

    - A failure is an exception of one of the types in `failures`. Any other exception is an answer: the dependency works.
    - Cancellation, and an open breaker further inside, say nothing about the dependency and count as neither.
    - While half open exactly one call is let through; the others get CircuitOpenError at once. A cancelled probe makes room for the next.
    - The outcome of a call that began before the last change of state is ignored: a straggler neither opens nor closes anything.
    - `on_change(name, state)` is called at once after each change; it must not block or raise.

    For one event loop. `clock` gives seconds and never goes back.
    """

    def __init__(
        self,
        name: str,
        *,
        failure_threshold: int = 5,
        reset_after: timedelta = timedelta(seconds=10),
        failures: tuple[type[Exception], ...] = (Exception,),
        on_change: Callable[[str, BreakerState], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failure_threshold < 1:
            raise ValueError("failure_threshold must be at least 1")
        self.name = name
        self._reset_after = reset_after.total_seconds()
        self._failures = failures
        self._clock = clock
        self._opened_at = 0.0
        self._changes = 0
        self._probing = False
        self._circuit = pybreaker.CircuitBreaker(fail_max=failure_threshold, name=name, listeners=[_Listener(self._changed)])
        self._on_change = on_change

    @property
    def state(self) -> BreakerState:
        """`closed`, `open`, or `half_open` from the moment a probe may go until its outcome is known."""
        state = _STATES[self._circuit.current_state]
        return "half_open" if state == "open" and self._remaining() <= 0 else state

    @property
    def retry_after(self) -> timedelta:
        """How long until a probe may be let through; zero when the breaker is not open."""
        return timedelta(seconds=max(0.0, self._remaining())) if self.state == "open" else timedelta(0)

    async def call(self, function: Callable[P, Awaitable[R]], /, *arguments: P.args, **keywords: P.kwargs) -> R:
        """Awaits `function(...)` under the guard. Raises CircuitOpenError without calling it when the breaker lets nothing through."""
        async with self.guard():
            return await function(*arguments, **keywords)

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """The block is one call. Raises CircuitOpenError before the block when the breaker lets nothing through; never waits."""
        began = self._admit()
        try:
            yield
        except CircuitOpenError:
            raise
        except Exception as error:
            self._tell(began, error if isinstance(error, self._failures) else None)
            raise
        else:
            self._tell(began, None)
        finally:
            self._leave(began)

    def _admit(self) -> int:
        """Lets the caller in or raises. Returns the number of state changes so far, by which its outcome is recognised as current."""
        state = self.state
        if state == "open" or self._probing:
            raise CircuitOpenError(self.name, self.retry_after)
        if state == "half_open":
            if self._circuit.current_state != pybreaker.STATE_HALF_OPEN:
                self._circuit.half_open()
            self._probing = True
        return self._changes

    def _tell(self, began: int, failure: Exception | None) -> None:
        if began != self._changes:
            return
        if failure is None:
            self._circuit.call(_succeed)
            return
        try:
            self._circuit.call(_fail, failure)
        except (pybreaker.CircuitBreakerError, type(failure)):
            return  # raised again to pybreaker's caller; ours gets it from the guard

    def _leave(self, began: int) -> None:
        if began == self._changes:
            self._probing = False

    def _changed(self, state: BreakerState) -> None:
        self._changes += 1
        self._probing = False
        if state == "open":
            self._opened_at = self._clock()
        if self._on_change is not None:
            self._on_change(self.name, state)

    def _remaining(self) -> float:
        return self._opened_at + self._reset_after - self._clock()


class _Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, changed: Callable[[BreakerState], None]) -> None:
        self._changed = changed

    def state_change(
        self, cb: pybreaker.CircuitBreaker, old_state: pybreaker.CircuitBreakerState | None, new_state: pybreaker.CircuitBreakerState
    ) -> None:
        self._changed(_STATES[new_state.name])


def _succeed() -> None:
    """What pybreaker is given to call when the real call succeeded."""


def _fail(failure: Exception) -> None:
    raise failure
