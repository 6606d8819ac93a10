"""One transaction for what several partitions of a consumer have in hand, where each has little.

Only the plain way through: `docs/delivery.md` has the invariant. Whatever else happens, the transaction is rolled back and each partition
goes its own way, so that refusals, retries, parking and suspects stay where they are (`transactional`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import faults
from tessera.bus.applying import Workshop, inbox_items
from tessera.bus.deadletters import is_refusable
from tessera.bus.delivery import Delivery, expired
from tessera.bus.events import Received
from tessera.bus.inbox import Entry, enter
from tessera.bus.outbox import OutboxRow
from tessera.bus.positions import FencedError, Mark, Move, PositionRow, advance_all, set_marks
from tessera.contracts.base import EventData
from tessera.contracts.errors import InvalidError
from tessera.telemetry import get_logger, metrics

PATIENCE: Final = timedelta(seconds=1)
"""How long a part waits for the transaction before it."""
SLOW: Final = timedelta(milliseconds=250)
"""After a transaction that took longer partitions go apart: handlers that wait for something should do so side by side."""
_FEW: Final = 100
"""From so many events on what a transaction costs by itself is the smaller part, and two side by side keep more than one core busy."""
_APART_AFTER_FAILURE: Final = timedelta(seconds=1)
_APART_AFTER_SLOWNESS: Final = timedelta(seconds=10)

_log = get_logger(__name__)


class NotPlainError(Exception):
    """An event that must be looked at by itself, or more than the time allows."""


@dataclass(eq=False, slots=True)
class Part:
    """What one partition has in hand, all of it sound as far as its loop knows."""

    row: PositionRow
    stored: int
    deliveries: Sequence[Delivery]
    mark: Mark
    marked: bool
    """Whether the mark is set."""
    following: Callable[[], Mark | None]
    """Which batch to mark for after this one; asked when everything else is written."""
    outcome: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def tell(self, applied: bool) -> None:
        """Lets its loop go on, unless that is told already, or gone."""
        if not self.outcome.done():
            self.outcome.set_result(applied)

    def fail(self, error: Exception) -> None:
        """Tells its loop of an error that is its own."""
        if not self.outcome.done():
            self.outcome.set_exception(error)


class Together:
    """Collects the parts of a consumer's partitions while a transaction runs, and takes them all into the next one."""

    def __init__(self, group: str, workshop: Workshop) -> None:
        self._group = group
        self._workshop = workshop
        self._calls = workshop.calls(group)
        self._waiting: list[Part] = []
        self._running: Sequence[Part] = ()
        self._round: asyncio.Task[None] | None = None
        self._apart_until = 0.0

    def takes(self, events: int) -> bool:
        """Whether so many events of one partition may share a transaction now. Many gain nothing by it."""
        return events < min(_FEW, self._workshop.batch_records / 2) and time.monotonic() >= self._apart_until

    async def apply(self, part: Part) -> bool:
        """True when everything of the part is committed; False when nothing is, and it has to go its own way.

        Raises what went wrong where nobody else was in the transaction, but for InvalidError. Cancelled, it has left nothing behind that
        still runs.
        """
        self._waiting.append(part)
        self._begin()
        patience = asyncio.get_running_loop().call_later(PATIENCE.total_seconds(), self._release, part)
        try:
            return await part.outcome
        except asyncio.CancelledError:
            await self._withdraw(part)
            raise
        finally:
            patience.cancel()

    # --- rounds -----------------------------------------------------------------------------------
    def _begin(self) -> None:
        if self._round is None and self._waiting:
            self._round = asyncio.create_task(self._run(), name=f"{self._group}:together")
            self._round.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._round = None
        self._begin()

    def _release(self, part: Part) -> None:
        """Somebody's slow handler must not hold up a partition that has nothing to do with it."""
        if part in self._waiting:
            self._waiting.remove(part)
            part.tell(False)

    async def _withdraw(self, part: Part) -> None:
        """What has begun is rolled back for all: the part's loop must know that nothing of it will be committed any more."""
        if part in self._waiting:
            self._waiting.remove(part)
        elif part in self._running and self._round is not None:
            if not self._round.cancelling():
                self._round.cancel()
            await asyncio.wait({self._round})

    async def _run(self) -> None:
        async with self._workshop.quarantine.together(), self._workshop.in_flight:
            parts = self._running = self._taken()
            started = time.monotonic()
            try:
                if parts:
                    await self._transact(parts)
            except Exception as error:  # noqa: BLE001
                self._failed(error, started)
            else:
                if _was_slow(started):
                    self._stay_apart(_APART_AFTER_SLOWNESS)
            finally:
                self._running = ()
                for part in parts:
                    part.tell(False)  # to those that know of nothing better

    def _taken(self) -> Sequence[Part]:
        """Those that wait, as many as are no more than one batch, in the order in which rows are locked."""
        taken, room = 0, self._workshop.batch_records
        while taken < len(self._waiting) and (room := room - len(self._waiting[taken].deliveries)) >= 0:
            taken += 1
        parts, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return sorted(parts, key=lambda part: (part.row.topic, part.row.partition))

    def _failed(self, error: Exception, started: float) -> None:
        parts = self._running
        _log.info("a shared transaction was rolled back", consumer=self._group, partitions=len(parts), error=repr(error))
        if len(parts) == 1 and not isinstance(error, (InvalidError, NotPlainError)):
            parts[0].fail(error)
        self._stay_apart(_APART_AFTER_SLOWNESS if _was_slow(started) else _APART_AFTER_FAILURE)

    def _stay_apart(self, pause: timedelta) -> None:
        self._apart_until = time.monotonic() + pause.total_seconds()

    # --- one transaction --------------------------------------------------------------------------
    async def _transact(self, parts: Sequence[Part]) -> None:
        parts = await self._marked(parts)
        rows: list[OutboxRow] = []
        async with self._workshop.database.transaction() as connection:
            await self._apply(connection, parts, rows)
            await advance_all(connection, self._group, [_move(part) for part in parts], rows)
            faults.reach(faults.CONSUMED_BEFORE_COMMIT)
        for part in parts:
            part.tell(True)
        faults.reach(faults.COMMITTED_BEFORE_OFFSET)

    async def _marked(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Marks those that are not, durably before anything is handled. Those that are fenced are left out."""
        unmarked = [part for part in parts if not part.marked]
        if not unmarked:
            return parts
        async with self._workshop.database.driver() as driver:
            found = await set_marks(driver, self._group, [(part.row, part.stored, part.mark) for part in unmarked])
        for part in unmarked:
            part.marked = part.row in found
        if not any(part.marked for part in parts):
            raise FencedError(f"No position of {self._group} is where it was.")
        return [part for part in parts if part.marked]

    async def _apply(self, connection: AsyncConnection, parts: Sequence[Part], rows: list[OutboxRow]) -> None:
        events = list(await self._entered(connection, parts))
        if any(expired(event) for event in events):
            raise NotPlainError("an event has expired")
        done = await self._calls.each(connection, events, rows)
        if done < len(events):
            raise NotPlainError("the time did not suffice")

    async def _entered(self, connection: AsyncConnection, parts: Sequence[Part]) -> Iterator[Received[EventData]]:
        """The events that have no effect yet. Repeats need nothing but that the position passes them."""
        deliveries = [delivery for part in parts for delivery in part.deliveries]
        entries = await enter(connection, self._group, inbox_items(deliveries))
        for delivery, entry in zip(deliveries, entries, strict=True):
            if entry is Entry.REUSED and is_refusable(delivery.place.topic):
                raise NotPlainError("an identity is used for another event")
        repeats = len(entries) - entries.count(Entry.NEW)
        if repeats:
            metrics.BUS_DUPLICATES.labels(consumer=self._group).inc(repeats)
        return (delivery.ready for delivery, entry in zip(deliveries, entries, strict=True) if entry is Entry.NEW)


def _move(part: Part) -> Move:
    return Move(part.row, part.stored, part.deliveries[-1].offset + 1, part.following())


def _was_slow(started: float) -> bool:
    return time.monotonic() - started > SLOW.total_seconds()
