"""An event loop with virtual time, a seeded order of what is ready, and processes that can be killed or frozen between any two steps.

Nothing here waits: when nothing is ready, the clock jumps to the next timer. Every callback runs in a context; what a process started runs
in that process's context, so a killed process simply never runs again, as after SIGKILL: no `finally`, no `except`.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

MOST_STEPS: Final = 100_000
"""A world that takes more goes round in circles."""
EPOCH: Final = 1_800_000_000.0
"""What the wall clock shows when a world begins."""


class ProcessKilledError(BaseException):
    """Ends the step that kills its own process; nobody may catch it."""


class Process:
    """What dies and freezes together: the tasks of one replica."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.kept: list[asyncio.Handle] = []
        """What became ready while frozen."""
        self.on_death: list[Callable[[], None]] = []
        """Told when it is killed: the other ends of its connections."""


WORLD: Final = contextvars.Context()
"""The context of servers: what they do goes on when the process that asked is gone."""
CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
"""The process that runs now; None is the world around: servers and producers."""


class SimulatedTask(asyncio.Task[Any]):
    """Hashes by its number and not by its address, so that sets of tasks have the same order in every run."""

    __slots__ = ("number",)
    numbers = itertools.count()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.number = next(SimulatedTask.numbers)
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Clockwork:
    """Stands where a selector would: there is nothing to select from."""

    def close(self) -> None:
        """Nothing is open."""


class SimulationLoop(asyncio.BaseEventLoop):
    """One world's time and order. `shuffled` picks among what is ready; else first come, first served, as asyncio does it."""

    def __init__(self, chance: random.Random, *, shuffled: bool) -> None:
        super().__init__()
        SimulatedTask.numbers = itertools.count()
        self._selector = _Clockwork()
        self._chance = chance
        self._shuffled = shuffled
        self._now = 0.0
        self.steps = 0
        self.broken: list[dict[str, Any]] = []
        self.set_task_factory(lambda loop, coroutine, **options: SimulatedTask(coroutine, loop=loop, **options))
        self.set_exception_handler(lambda _, context: self.broken.append(context))

    def time(self) -> float:
        return self._now

    def wall_time(self) -> float:
        """Seconds since 1970 in this world."""
        return EPOCH + self._now

    def _process_events(self, event_list: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody is asleep."""

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise RuntimeError("the world stands still: nothing is ready and nothing is planned")
            self._now = max(self._now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        if self._shuffled and len(ready) > 1:
            ready.rotate(-self._chance.randrange(len(ready)))
        if ready:
            self._step(ready.popleft())

    def _step(self, handle: asyncio.Handle) -> None:
        if handle._cancelled:
            return
        process = handle._context.get(CURRENT)
        if process is not None:
            if not process.alive:
                return
            if process.frozen:
                process.kept.append(handle)
                return
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise RuntimeError(f"the world goes round in circles, at {self._now:.3f} s in {handle!r}")
        try:
            handle._run()
        except ProcessKilledError:
            return

    # --- processes --------------------------------------------------------------------------------
    def run_in(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task of `process`."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, process)
        return self.create_task(coroutine, context=context)

    def kill(self, process: Process) -> None:
        """From now on nothing of it runs."""
        process.alive = False
        process.kept.clear()
        for tell in process.on_death:
            tell()

    def freeze(self, process: Process) -> None:
        """SIGSTOP: it does nothing, and its connections stay open."""
        process.frozen = True

    def thaw(self, process: Process) -> None:
        """SIGCONT: what became ready meanwhile runs now, in the order in which it became so."""
        process.frozen = False
        self._ready.extend(process.kept)
        process.kept.clear()
