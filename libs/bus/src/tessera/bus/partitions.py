"""One assigned partition: a queue of records, flow control, and a loop that a delivery mode fills in."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from tessera.bus import faults
from tessera.bus.records import Record
from tessera.contracts.catalogue import Topic
from tessera.contracts.errors import FatalError, RetryableError
from tessera.contracts.events import StuckEvent
from tessera.resilience import ResilienceError, RetryPolicy
from tessera.telemetry import get_logger

State = Literal["running", "paused", "backing_off", "stopped"]

PASSING: Final = (RetryableError, ResilienceError)
"""What may succeed later: it costs no attempt and never leads to the dead letters."""
BACKOFF: Final = RetryPolicy(attempts=None, initial=timedelta(milliseconds=100), maximum=timedelta(seconds=10))

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One partition of one topic, as this consumer got it."""

    consumer: AIOKafkaConsumer
    partition: TopicPartition
    """With the operator's prefix."""
    topic: Topic
    name: str
    """The topic's name in the catalogue's spelling; `ingest.<tenant>` for a tenant's own."""
    group: str
    """`<service>.<class>`, without the operator's prefix."""


class Gate:
    """Open while an operator has not paused the consumer."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    @property
    def closed(self) -> bool:
        """Whether the consumer is paused."""
        return not self._open.is_set()

    def close(self) -> None:
        """Nothing further is taken."""
        self._open.clear()

    def open(self) -> None:
        """Work goes on."""
        self._open.set()

    async def passed(self) -> None:
        """Waits until the gate is open."""
        await self._open.wait()


class PartitionLoop(ABC):
    """Takes the records of one partition in order. `offer` and `close` are called by the consumer; `_run` is the mode's."""

    def __init__(
        self, assignment: Assignment, gate: Gate, *, high_water: int, commit_every: timedelta, on_fatal: Callable[[FatalError], None]
    ) -> None:
        self.assignment = assignment
        self._gate = gate
        self._high_water = high_water
        self._commit_every = commit_every
        self._committed: int | None = None
        self._moved = asyncio.Event()
        """Set by a mode whenever `_finished` has changed: there is something to commit."""
        self._on_fatal = on_fatal
        self._queue: deque[Record] = deque()
        self._arrived = asyncio.Event()
        self._stopping = asyncio.Event()
        self._held = False
        self._interrupted = False
        self._backing_off = False
        self._task: asyncio.Task[None] | None = None
        self.handled_at = time.monotonic()

    def start(self) -> None:
        """Starts the loop."""
        self._task = asyncio.create_task(self._guarded(), name=f"{self.assignment.group}:{self.assignment.partition}")

    def offer(self, records: Iterable[Record]) -> None:
        """Queues fetched records; fetching of this partition alone is paused while too many wait."""
        self._queue.extend(records)
        self._arrived.set()
        if len(self._queue) >= self._high_water:
            self._hold()

    async def close(self, grace: timedelta) -> None:
        """Takes nothing further, finishes and commits what is in hand. What is not done within `grace` is cancelled: redelivered."""
        self._stopping.set()
        self._arrived.set()
        if self._task is None:
            return
        done, _ = await asyncio.wait({self._task}, timeout=grace.total_seconds())
        if not done:
            _log.warning("partition not drained in time", partition=str(self.assignment.partition), grace_seconds=grace.total_seconds())
            self._task.cancel()
            await asyncio.wait({self._task})

    @property
    def state(self) -> State:
        """What the loop does."""
        if self._stopping.is_set():
            return "stopped"
        return "paused" if self._gate.closed else "backing_off" if self._backing_off else "running"

    @property
    @abstractmethod
    def position(self) -> int | None:
        """The next offset that is not handled yet, as far as known."""

    @property
    @abstractmethod
    def _finished(self) -> int | None:
        """The offset to commit: everything below it is handled. None before the first."""

    def decide(self, offset: int, *, discard: bool) -> None:
        """An operator's word about an event that is set aside: try it again now, or give it up. Unknown offsets are passed over."""
        _log.info("nothing is set aside here", partition=str(self.assignment.partition), offset=offset, discard=discard)

    @property
    def set_aside(self) -> int:
        """Events that wait for another attempt, or behind one of their key, while others go on."""
        return 0

    def stuck(self) -> list[StuckEvent]:
        """Events that have failed at every attempt, or very often."""
        return []

    @property
    def waiting(self) -> int:
        """Records fetched and not yet taken."""
        return len(self._queue)

    def stalled_for(self) -> timedelta:
        """How long work has been waiting without progress; zero when there is none, or while paused or backing off."""
        if self.state != "running" or not self._has_work():
            return timedelta(0)
        return timedelta(seconds=time.monotonic() - self.handled_at)

    @abstractmethod
    async def _run(self) -> None:
        """Works until stopping. Raises FatalError when going on would do harm."""

    def _has_work(self) -> bool:
        return bool(self._queue)

    async def _guarded(self) -> None:
        try:
            await self._run()
        except FatalError as error:
            self._on_fatal(error)
        except Exception as error:  # noqa: BLE001
            # A broken loop must never sit there silently: the process ends and a fresh one begins from the committed position.
            _log.exception("partition loop broke", partition=str(self.assignment.partition))
            self._on_fatal(FatalError(f"the loop of {self.assignment.partition} broke: {error!r}"))

    async def _taken(self, limit: int, patience: timedelta | None = None) -> list[Record]:
        """Up to `limit` records, in order, as soon as one is ready; none when stopping, after `patience`, or when interrupted."""
        until = None if patience is None else time.monotonic() + patience.total_seconds()
        while not (self._stopping.is_set() or self._interrupted):
            if self._gate.closed:
                await self._first(self._gate.passed())
            elif ready := self._ready(limit):
                return self._pop(ready)
            elif not await self._something_happens(until):
                break
        self._interrupted = False
        return []

    async def _something_happens(self, until: float | None) -> bool:
        """Waits for records, or for those that are here to become ready. False when it is `until`."""
        self._arrived.clear()
        self.handled_at = time.monotonic()
        limits = [limit for limit in (until, self._ready_at()) if limit is not None]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(limits) - time.monotonic()) if limits else None):
                await self._arrived.wait()
        return until is None or time.monotonic() < until

    def _interrupt(self) -> None:
        """Lets whoever waits for records go on without any."""
        self._interrupted = True
        self._arrived.set()

    def _ready(self, limit: int) -> int:
        """How many of the first `limit` records may be handled now."""
        return min(limit, len(self._queue))

    def _ready_at(self) -> float | None:
        """When a record that waits here may be handled, by `time.monotonic`; None when it depends on nothing but its arrival."""
        return None

    def _return(self, records: Iterable[Record]) -> None:
        """Puts records back that were taken and not handled; they come next."""
        self._queue.extendleft(reversed(list(records)))

    def _pop(self, number: int) -> list[Record]:
        taken = [self._queue.popleft() for _ in range(number)]
        if self._held and len(self._queue) <= self._high_water // 2:
            self._release()
        return taken

    async def _first(self, awaited: Coroutine[Any, Any, None]) -> None:
        """Waits for `awaited`, or for the order to stop, whichever is first."""
        tasks = {asyncio.create_task(awaited), asyncio.create_task(self._stopping.wait())}
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()

    async def _pause(self, failures: int) -> None:
        """Backs off after `failures` in a row; ends early when stopping."""
        self._backing_off = True
        try:
            await self._first(asyncio.sleep(BACKOFF.pause(failures).total_seconds()))
        finally:
            self._backing_off = False
            self.handled_at = time.monotonic()

    def _hold(self) -> None:
        if not self._held and self._is_assigned():
            self._held = True
            self.assignment.consumer.pause(self.assignment.partition)

    def _release(self) -> None:
        self._held = False
        if self._is_assigned():
            self.assignment.consumer.resume(self.assignment.partition)

    def _is_assigned(self) -> bool:
        return self.assignment.partition in self.assignment.consumer.assignment()

    @asynccontextmanager
    async def _committing(self) -> AsyncIterator[None]:
        """Commits the group's offset now and then while the block runs: at most as often as needed, never in the way of the next batch."""
        committing = asyncio.create_task(self._keep_committing())
        try:
            yield
        finally:
            committing.cancel()

    async def _keep_committing(self) -> None:
        failures = 0
        while True:
            if not failures:
                await self._moved.wait()
                self._moved.clear()
            pause = BACKOFF.pause(failures) if failures else self._commit_every
            await asyncio.sleep(pause.total_seconds())
            failures = 0 if await self._commit_finished() else failures + 1

    async def _commit_finished(self) -> bool:
        """Commits what is finished, if that is news. False when it failed: only logged, for the next commit covers it."""
        offset = self._finished
        if offset is None or offset == self._committed or not self._is_assigned():
            return True
        try:
            await self.assignment.consumer.commit({self.assignment.partition: offset})
        except (KafkaError, IllegalStateError) as error:
            _log.warning("offset not committed", partition=str(self.assignment.partition), offset=offset, error=repr(error))
            return False
        self._committed = offset
        faults.reach(faults.OFFSET_COMMITTED)
        return True
