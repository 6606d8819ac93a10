"""Wait for a condition with a deadline, instead of sleeping and hoping."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar, overload

T = TypeVar("T")
DEFAULT = timedelta(seconds=60)
_SHORTEST_SECONDS = 0.02
_LONGEST_SECONDS = 0.25
_SHARE = 0.1
"""Of the time waited so far: looking costs a processor that what is waited for could use, and adds at most this much to the wait."""


@overload
async def eventually(condition: Callable[[], Awaitable[T | None]], timeout: timedelta | float = DEFAULT) -> T: ...  # noqa: ASYNC109 - polls
@overload
async def eventually(condition: Callable[[], T | None], timeout: timedelta | float = DEFAULT) -> T: ...  # noqa: ASYNC109 - polls
async def eventually(condition: Callable[[], Any], timeout: timedelta | float = DEFAULT) -> Any:  # noqa: ASYNC109 - polls
    """Call `condition` (plain or async) until it returns something true and raises no AssertionError; give that back.

    After the time-out (seconds or timedelta) raises AssertionError with the last failure or the last value.
    """
    began = time.monotonic()
    deadline = began + _seconds(timeout)
    while True:
        failure: AssertionError | None = None
        value = None
        try:
            value = condition()
            value = await value if inspect.isawaitable(value) else value
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        _go_on_until(deadline, timeout, value, failure)
        await asyncio.sleep(_pause(began))


def eventually_blocking(condition: Callable[[], T | None], timeout: timedelta | float = DEFAULT) -> T:
    """`eventually` for tests without an event loop; a condition may itself wait so. Blocks."""
    began = time.monotonic()
    deadline = began + _seconds(timeout)
    while True:
        failure: AssertionError | None = None
        value = None
        try:
            value = condition()
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        _go_on_until(deadline, timeout, value, failure)
        time.sleep(_pause(began))


def _go_on_until(deadline: float, timeout: timedelta | float, value: object, failure: AssertionError | None) -> None:
    if time.monotonic() > deadline:
        raise AssertionError(f"not within {_seconds(timeout)} s; last result: {str(failure) if failure else repr(value)}") from failure


def _pause(began: float) -> float:
    return min(max(_SHORTEST_SECONDS, _SHARE * (time.monotonic() - began)), _LONGEST_SECONDS)


def _seconds(timeout: timedelta | float) -> float:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
