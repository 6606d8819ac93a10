"""The mode transactional: inbox, state, outbox and position of one batch in one Postgres transaction, the group's offset afterwards.

`docs/delivery.md` has the invariant and every point at which the process may die, `docs/retries.md` what becomes of events that fail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from tessera.bus import faults, outbox, parked
from tessera.bus.applying import Applied, Applier, Attempts, Workshop
from tessera.bus.calling import HandlerTimeoutError, PostponedError
from tessera.bus.delivery import Delivery, delivered
from tessera.bus.parked import Begun, Failed, Parked, ParkedIndex, ParkedRows, State
from tessera.bus.partitions import BACKOFF, PASSING, Assignment, Gate, PartitionLoop
from tessera.bus.partitions import State as LoopState
from tessera.bus.positions import FencedError, Mark, PositionRow
from tessera.bus.publisher import as_retryable
from tessera.bus.records import Record
from tessera.bus.retries import due_in
from tessera.bus.together import Part, Together
from tessera.contracts.catalogue import RETRY_TOPICS
from tessera.contracts.errors import FatalError, InvalidError, RetryableError, TesseraError
from tessera.contracts.events import StuckEvent
from tessera.storage import driver_of
from tessera.telemetry import get_logger, metrics

IN_PLACE: Final = 3
"""Attempts of a batch in a row before what fails for a passing reason is put off."""
_PROBE: Final = timedelta(seconds=2)
_GIVE_BACK: Final = timedelta(seconds=5)
"""How long a stopping loop tries to take its mark back while Postgres is away."""
_TURN: Final = timedelta(seconds=1)
"""Parked events are retried so long at a time; then new ones have their turn."""
_LOOK_AGAIN: Final = timedelta(minutes=10)
_PRUNED_ROWS: Final = 1_000

_log = get_logger(__name__)


@dataclass(slots=True)
class _InHand:
    """A batch, whether its mark is set, and how it may share a transaction, which is tried once."""

    batch: Sequence[Record]
    marked: bool
    part: Part | None


class TransactionalLoop(PartitionLoop):
    """Handles one partition, batch by batch; one by one where an earlier attempt died."""

    def __init__(
        self, assignment: Assignment, gate: Gate, workshop: Workshop, together: Together, *, on_fatal: Callable[[FatalError], None]
    ) -> None:
        super().__init__(assignment, gate, high_water=4 * workshop.batch_records, commit_every=workshop.commit_every, on_fatal=on_fatal)
        self._workshop = workshop
        self._together = together
        self._row = PositionRow(assignment.group, assignment.name, assignment.partition.partition)
        self._located = False
        self._position = 0
        self._suspects_until = 0
        """Offsets below it were in a batch that died or broke: they are handled one by one."""
        self._attempts = Attempts()
        self._redelivered: set[int] = set()
        self._marked: Mark | None = None
        """Of the batch in hand, or of the next one."""
        self._following: Mark | None = None
        """Set with a position whose commit is not known yet."""
        self._ahead: set[Mark] = set()
        """Every mark that a commit has set, if one of those that we never heard of took place."""
        self._retry_topic = RETRY_TOPICS.get(assignment.name)
        self._in_place = IN_PLACE if self._retry_topic is None else 1
        self._parked = ParkedRows(assignment.group, assignment.name, assignment.partition.partition)
        self._index = ParkedIndex()
        self._applier = Applier(assignment, workshop, self._index, self._attempts)
        self._begun: Begun | None = None
        self._decisions: list[tuple[int, bool]] = []
        self._look_at = 0.0

    def start(self) -> None:
        """Starts the loop; nothing is fetched until the stored position is known."""
        self.assignment.consumer.pause(self.assignment.partition)
        super().start()

    @property
    def position(self) -> int | None:
        """The stored position; None until it has been read."""
        return self._position if self._located else None

    @property
    def _finished(self) -> int | None:
        return self.position

    @property
    def set_aside(self) -> int:
        """Events that wait here for another attempt, or behind one of their key."""
        return len(self._index)

    def stuck(self) -> list[StuckEvent]:
        """Events that an operator must decide about."""
        name, number = self.assignment.name, self.assignment.partition.partition
        return [
            StuckEvent(topic=name, partition=number, offset=entry.offset, code=entry.code, attempts=entry.attempts, since=entry.since)
            for entry in self._index.stuck()
        ]

    def decide(self, offset: int, *, discard: bool) -> None:
        """An operator's word about a parked event: try it again now, or give it up. Unknown offsets are passed over."""
        if self._index.get(offset) is not None:
            self._decisions.append((offset, discard))
            self._interrupt()

    # --- position ---------------------------------------------------------------------------------
    async def _run(self) -> None:
        await self._persist(self._locate)
        async with self._committing():
            while not self._stopping.is_set():
                await self._obey()
                await self._retry_parked()
                await self._prune()
                if self._gate.closed:
                    await self._persist(self._unmark)
                mark = self._marked
                batch = await self._taken(self._batch_limit(), self._patience()) if mark is None else self._marked_batch(mark)
                if fresh := [record for record in batch if record.offset >= self._position]:
                    await self._handle(fresh, marked=mark is not None)

    def _patience(self) -> timedelta:
        """How long to wait for new records before there is something else to do."""
        due = self._index.due_in()
        return _LOOK_AGAIN if due is None else min(_LOOK_AGAIN, due)

    @property
    def state(self) -> LoopState:
        """What the loop does; it backs off, too, while there is no room to park more."""
        state = super().state
        return "backing_off" if state == "running" and self._is_full() else state

    def _is_full(self) -> bool:
        return len(self._index) >= self._workshop.limits.parked

    def _ready(self, limit: int) -> int:
        """Nothing while too much is parked; of a retry topic, what is due."""
        if self._is_full():
            return 0
        if self._retry_topic is None:
            return super()._ready(limit)
        retry, ready = self._retry_topic, 0
        while ready < min(limit, len(self._queue)) and not due_in(self._queue[ready], retry):
            ready += 1
        return ready

    def _ready_at(self) -> float | None:
        if self._retry_topic is None or not self._queue:
            return None
        self._hold()
        return time.monotonic() + due_in(self._queue[0], self._retry_topic).total_seconds()

    def _has_work(self) -> bool:
        return bool(self._queue) and self._ready(1) > 0

    async def _persist(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeats `step` with backoff until it succeeds or the loop stops."""
        failures = 0
        while not self._stopping.is_set():
            try:
                await step()
            except PASSING as error:
                failures += 1
                _log.warning("waiting for storage or Kafka", partition=str(self.assignment.partition), error=str(error), failures=failures)
                await self._pause(failures)
            else:
                return

    async def _locate(self) -> None:
        """Seeks to the stored position, which outranks the group's offset (rules of the log, 10)."""
        async with self._workshop.in_flight:  # all partitions of a process that starts, together, would not leave a connection free
            stored, mark = await self._stored()
            if stored is None:
                stored = await self._begin()
            start, end = await self._log_bounds()  # after the position, which a replica that is being replaced may still move with the log
            self._check_bounds(stored, start, end)
            waiting = await self._waiting()
        self._position, self._located = stored, True
        self._moved.set()
        self._index.load(waiting)
        self._suspect(mark)
        if self._is_assigned():
            self.assignment.consumer.seek(self.assignment.partition, stored)
            self.assignment.consumer.resume(self.assignment.partition)

    async def _waiting(self) -> list[Parked]:
        """What is parked, read after the position: what a replica that is being replaced has parked since moved the position too, and
        fences us before we could miss it.
        """
        async with self._workshop.database.transaction() as connection:
            return await self._parked.load(connection)

    async def _stored(self) -> tuple[int | None, Mark | None]:
        async with self._workshop.database.transaction() as connection:
            return await self._row.read(connection), await self._row.mark(connection)

    async def _begin(self) -> int:
        """Writes the first position: where the group was, else where the log starts. Returns what is stored, whoever came first."""
        with as_retryable():
            committed = await self.assignment.consumer.committed(self.assignment.partition)
        first = committed if committed is not None else (await self._log_bounds())[0]
        async with self._workshop.database.transaction() as connection:
            await self._row.begin(connection, first)
            stored = await self._row.read(connection)
        return first if stored is None else stored

    async def _log_bounds(self) -> tuple[int, int]:
        consumer, partition = self.assignment.consumer, self.assignment.partition
        with as_retryable():
            starts, ends = await asyncio.gather(consumer.beginning_offsets([partition]), consumer.end_offsets([partition]))
        return starts[partition], ends[partition]

    def _check_bounds(self, stored: int, start: int, end: int) -> None:
        if start <= stored <= end:
            return
        raise FatalError(
            f"{self.assignment.group} is at offset {stored} of {self.assignment.partition}, but the log holds {start} to {end}: "
            "events were lost, or the topic was made anew. Going on would hide that; set the row in consumer_position by hand once the "
            "loss is understood."
        )

    def _suspect(self, mark: Mark | None) -> None:
        if mark is None or mark.last < self._position:
            return
        self._suspects_until = mark.last + 1
        died = range(max(mark.first, self._position), mark.last + 1)
        self._attempts.counts = dict.fromkeys(died, mark.attempts)
        self._redelivered = set(died)
        _log.warning(
            "a batch died before its commit; its events are handled one by one", partition=str(self.assignment.partition), mark=str(mark)
        )

    def _batch_limit(self) -> int:
        return 1 if self._position < self._suspects_until else self._workshop.batch_records

    # --- one batch --------------------------------------------------------------------------------
    async def _handle(self, batch: Sequence[Record], *, marked: bool = False) -> None:
        failures, postponed = 0, 0
        hand = _InHand(batch, marked, self._part(batch, marked=marked))
        while not self._stopping.is_set():
            try:
                applied = await self._tried(hand, postponing=postponed + 1 >= self._in_place)
            except FencedError:
                await self._requeue(batch)
                return
            except FatalError:
                raise
            except Exception as error:  # noqa: BLE001
                if not await self._passes(error):
                    self._blame(batch, error)
                    hand.marked = False  # the next try is one more attempt, and counts
                    if len(batch) > 1:
                        await self._one_by_one(batch)
                        return
                else:
                    postponed += isinstance(error, PostponedError)
                    self._tell_retry(error, failures)
            else:
                self._finish(batch, applied)
                return
            failures += 1
            await self._pause(failures)

    async def _tried(self, hand: _InHand, *, postponing: bool) -> Applied:
        """One try: together with what other partitions have in hand, where that may be, else or in vain in a transaction of its own."""
        part, hand.part = hand.part, None
        if part is not None:
            try:
                if await self._together.apply(part):
                    return Applied(len(hand.batch))
            finally:
                hand.marked = part.marked
        async with self._room(hand.batch), self._workshop.in_flight:
            if not hand.marked:
                await self._mark(hand.batch)
                hand.marked = True
            return await self._attempt(hand.batch, postponing=postponing)

    def _part(self, batch: Sequence[Record], *, marked: bool) -> Part | None:
        """The batch as a part of a shared transaction; None where it is large, or anything about it is out of the ordinary."""
        first = batch[0].offset
        ordinary = first == self._position and first >= self._suspects_until and not (self._retry_topic or len(self._index))
        if not (ordinary and self._together.takes(len(batch))) or self._attempts.concern(batch):
            return None
        deliveries = [delivered(record, self.assignment) for record in batch]
        if any(delivery.event is None or delivery.is_replay for delivery in deliveries):
            return None
        mark = self._marked if marked else None
        if mark is None:
            mark = self._marked = Mark(first, batch[-1].offset)  # before it is known to be set: a commit in doubt is given back too
        return Part(self._row, self._position, deliveries, mark, marked, lambda: self._mark_ahead(deliveries, Applied(len(deliveries))))

    def _mark_ahead(self, deliveries: Sequence[Delivery], applied: Applied) -> Mark | None:
        """The mark of the next batch, known from now on although its commit is not."""
        following = self._following = self._next_mark(deliveries, applied)
        if following is not None:
            self._ahead.add(following)
        return following

    def _tell_retry(self, error: Exception, failures: int) -> None:
        metrics.BUS_RETRIES.labels(consumer=self.assignment.group).inc()
        _log.warning("rolled back, will be tried again", partition=str(self.assignment.partition), error=str(error), failures=failures)

    async def _passes(self, error: Exception) -> bool:
        """Whether a failure is no event's fault. A handler's time-out is none while Postgres does not answer either."""
        if not is_timed_out(error):
            return isinstance(error, PASSING)
        try:
            async with asyncio.timeout(_PROBE.total_seconds()):
                await self._workshop.database.check()
        except (*PASSING, TimeoutError):
            return True
        return False

    def _room(self, batch: Sequence[Record]) -> AbstractAsyncContextManager[None]:
        """A suspect is handled alone in the process: else a neighbour's death would count against it."""
        quarantine, first = self._workshop.quarantine, batch[0].offset
        return quarantine.alone() if first < self._suspects_until or first in self._attempts.broken else quarantine.together()

    async def _one_by_one(self, batch: Sequence[Record]) -> None:
        """Handles each record of a broken batch in a transaction of its own, so that only the culprit's attempts grow."""
        for number, record in enumerate(batch):
            if self._stopping.is_set():
                return
            if self._gate.closed:
                self._return(batch[number:])
                return
            if record.offset >= self._position:
                await self._handle([record])

    def _blame(self, batch: Sequence[Record], error: Exception) -> None:
        _log.error("rolled back by an unexpected error", partition=str(self.assignment.partition), events=len(batch), exc_info=error)
        for record in batch:
            self._attempts.blame(record.offset)

    async def _requeue(self, batch: Sequence[Record]) -> None:
        """Fenced: looks where the position is now and drops what others have handled.

        Our mark went with the position that was moved. Where we moved it ourselves and never heard of it, one of `_ahead` may be marked.
        """
        self._marked = None
        await self._persist(self._relocate)
        waiting = [*batch, *self._queue]
        self._queue.clear()
        self._queue.extend(record for record in waiting if record.offset >= self._position)

    async def _mark(self, batch: Sequence[Record]) -> None:
        """Durable before handling: whoever finds it later knows that the process died in this batch."""
        first, last = batch[0].offset, batch[-1].offset
        again = self._redelivered.intersection(record.offset for record in batch)
        if again:
            self._redelivered -= again
            metrics.BUS_REDELIVERED.labels(consumer=self.assignment.group).inc(len(again))
        mark = Mark(first, last, self._attempts.counts.get(first, 0) + 1 if len(batch) == 1 else 1)
        self._marked = mark  # before it is known to be set: a commit in doubt is given back too
        async with self._workshop.database.driver() as driver:
            await self._row.set_mark(driver, self._position, mark)
        if len(batch) == 1:
            self._attempts.counts[first] = mark.attempts

    async def _attempt(self, batch: Sequence[Record], *, postponing: bool) -> Applied:
        await self._check_gap(batch[0].offset)
        deliveries = [delivered(record, self.assignment) for record in batch]
        try:
            applied = await self._transact(deliveries, together=not postponing, postponing=postponing)
        except InvalidError:
            # A savepoint around each batch would save this second attempt, but cost every sound batch two round trips.
            applied = await self._transact(deliveries, together=False, postponing=False)
        faults.reach(faults.COMMITTED_BEFORE_OFFSET)
        return applied

    async def _transact(self, deliveries: Sequence[Delivery], *, together: bool, postponing: bool) -> Applied:
        group = self.assignment.group
        async with self._workshop.database.transaction() as connection:
            applied = await self._applier.apply(connection, deliveries, together=together, postponing=postponing)
            await outbox.write(connection, applied.rows)
            await parked.write(connection, group, applied.notes)
            await parked.remove(connection, group, applied.done)
            await parked.settle(connection, group, applied.replayed)
            following = self._mark_ahead(deliveries, applied)
            await self._row.advance(connection, self._position, deliveries[applied.handled - 1].offset + 1, following)
            faults.reach(faults.CONSUMED_BEFORE_COMMIT)
        return applied

    def _next_mark(self, deliveries: Sequence[Delivery], applied: Applied) -> Mark | None:
        """Of what is here to be handled next, so that it needs no statement of its own; none where something else may come before it."""
        next_up = deliveries[-1].offset + 1
        set_aside = self._retry_topic or applied.handled < len(deliveries) or applied.parked or len(self._index)
        suspected = next_up < self._suspects_until or any(offset >= next_up for offset in self._attempts.counts)
        if set_aside or suspected or self._stopping.is_set() or self._gate.closed:
            return None
        batch = [record.offset for record in islice(self._queue, self._workshop.batch_records) if record.offset >= next_up]
        return Mark(batch[0], batch[-1]) if batch else None

    def _marked_batch(self, mark: Mark) -> list[Record]:
        """What was marked with the position before it."""
        return self._pop(sum(record.offset <= mark.last for record in islice(self._queue, self._workshop.batch_records)))

    async def _unmark(self) -> None:
        """A paused consumer has nothing in hand."""
        await self._give_back()
        self._marked = None
        self._ahead.clear()

    async def _check_gap(self, first: int) -> None:
        """A gap is normal (compaction, aborted sends), unless the log's start has overtaken the position."""
        if first > self._position:
            start, _ = await self._log_bounds()
            self._check_bounds(self._position, start, first)

    def _finish(self, batch: Sequence[Record], applied: Applied) -> None:
        done, left = batch[: applied.handled], batch[applied.handled :]
        self._position, self._marked, self._following = done[-1].offset + 1, self._following, None
        self._ahead.clear()
        self._moved.set()
        for entry in applied.parked:
            self._index.add(entry)
        for record in done:
            self._attempts.forget(record.offset)
        self._return(left)
        self._judge(applied, len(done) - len(applied.letters))
        self.handled_at = time.monotonic()
        metrics.BUS_CONSUMED.labels(consumer=self.assignment.group, topic=self.assignment.topic.name).inc(len(done))

    def _judge(self, applied: Applied, others: int) -> None:
        """Halts the consumer where it only makes dead letters."""
        guard = self._workshop.guard
        guard.passed(max(0, others - len(applied.parked)))
        guard.count(applied.letters)
        if guard.reason is not None and not self._gate.closed:
            _log.error("consumer halted", consumer=self.assignment.group, reason=guard.reason)
            self._gate.close()

    async def close(self, grace: timedelta) -> None:
        """Finishes the batch in hand. One that is not finished was not handled: its mark is taken back, or it would count as a death."""
        await super().close(grace)
        await self._commit_finished()
        begun, self._begun = self._begun, None
        await self._patiently(self._give_back)
        self._marked = None
        self._ahead.clear()
        if begun is not None:
            await self._patiently(lambda: self._give_back_parked(begun))

    async def _patiently(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeats the step for a while, also when stopping."""
        failures = 0
        with suppress(SQLAlchemyError, TimeoutError):
            async with asyncio.timeout(_GIVE_BACK.total_seconds()):
                while True:
                    try:
                        return await step()
                    except PASSING:
                        failures += 1
                        await asyncio.sleep(BACKOFF.pause(failures).total_seconds())

    async def _give_back(self) -> None:
        """Takes a mark of ours back, also one that was set by a commit of which we never heard."""
        ours = {self._marked, *self._ahead} - {None}
        if not ours:
            return
        async with self._workshop.database.transaction() as connection:
            stored, mark = await self._row.read(connection), await self._row.mark(connection)
            if stored is None or mark is None or mark not in ours or not self._position <= stored <= mark.first:
                return  # somebody else has the partition, and marks of their own
            if mark.attempts > 1:
                await self._row.set_mark(driver_of(connection), stored, Mark(mark.first, mark.last, mark.attempts - 1))
            else:
                await self._row.clear_mark(connection)

    async def _relocate(self) -> None:
        async with self._workshop.database.transaction() as connection:
            stored = await self._row.read(connection)
            waiting = await self._parked.load(connection)
        if stored is None or stored < self._position:
            raise FatalError(
                f"the position of {self.assignment.group} on {self.assignment.partition} went back from {self._position} to {stored}"
            )
        metrics.BUS_FENCED.labels(consumer=self.assignment.group).inc()
        _log.warning(
            "fenced: another replica handled this partition", partition=str(self.assignment.partition), stored=stored, ours=self._position
        )
        self._position = stored
        self._moved.set()
        self._index.load(waiting)

    # --- parked events ----------------------------------------------------------------------------
    async def _retry_parked(self) -> None:
        """Tries heads that are due, the longest due first, for one turn."""
        until = time.monotonic() + _TURN.total_seconds()
        while time.monotonic() < until and not (self._stopping.is_set() or self._gate.closed):
            entry = self._index.due()
            if entry is None:
                return
            await self._retry(entry)

    async def _retry(self, entry: Parked) -> None:
        """One attempt. Where Postgres is what fails it is taken back, and this partition waits."""
        failures = 0
        while not self._stopping.is_set():
            try:
                async with self._retry_room(entry), self._workshop.in_flight:
                    await self._attempt_parked(entry)
            except FencedError:
                self._begun = None
                await self._persist(self._relocate)
            except FatalError:
                raise
            except Exception as error:  # noqa: BLE001
                if isinstance(error, PostponedError) or not await self._passes(error):
                    await self._persist(lambda error=error: self._postpone(entry, error))  # type: ignore[misc]
                    return
                self._tell_retry(error, failures)
                await self._persist(self._take_back)
                failures += 1
                await self._pause(failures)
                continue
            return

    def _retry_room(self, entry: Parked) -> AbstractAsyncContextManager[None]:
        quarantine = self._workshop.quarantine
        return quarantine.alone() if entry.failures else quarantine.together()

    async def _attempt_parked(self, entry: Parked) -> None:
        database, group = self._workshop.database, self.assignment.group
        async with database.transaction() as connection:
            await self._row.hold(connection, self._position)
            begun = self._begun = await self._parked.begin(connection, entry.offset)
        if begun is None:
            raise FencedError("The parked event is gone, or an operator has decided about it.")
        self._attempts.counts[entry.offset] = begun.failures
        delivery = delivered(begun.record, self.assignment)
        async with database.transaction() as connection:
            await self._row.hold(connection, self._position)
            applied = await self._applier.apply_parked(connection, delivery)
            await outbox.write(connection, applied.rows)
            if not await self._parked.end(connection, begun):
                raise FencedError("Another replica was faster with a parked event.")
            await parked.write(connection, group, applied.notes)
            await parked.settle(connection, group, applied.replayed)
            faults.reach(faults.CONSUMED_BEFORE_COMMIT)
        faults.reach(faults.COMMITTED_BEFORE_OFFSET)
        self._begun = None
        self._index.remove(entry.offset)
        self._attempts.forget(entry.offset)
        self._judge(applied, 0)
        self.handled_at = time.monotonic()
        _log.info("parked event done", partition=str(self.assignment.partition), offset=entry.offset, attempts=begun.attempts + 1)

    async def _postpone(self, entry: Parked, error: Exception) -> None:
        """Notes a failed attempt and when the next one is due. After the last one with a reason the event is stuck."""
        begun, limits = self._begun, self._workshop.limits
        if begun is None:
            return
        explained = isinstance(error, PostponedError)
        attempts = begun.attempts + int(explained)
        told = error if isinstance(error, TesseraError) else RetryableError(f"{type(error).__name__}", code="handler_failed")
        pause = self._applier.pause(max(1, attempts if explained else begun.failures))
        failed = Failed(told, pause, explained, is_last=attempts >= limits.attempts)
        async with self._workshop.database.transaction() as connection:
            await self._parked.postpone(connection, begun, failed)
        self._begun = None
        if explained:
            metrics.BUS_RETRIES.labels(consumer=self.assignment.group).inc()
        else:
            self._attempts.blame(entry.offset)
        self._tell_postponed(begun, failed, error)
        state = State.STUCK if failed.is_last else State.WAITING
        due = time.monotonic() + pause.total_seconds()
        self._index.change(
            replace(entry, state=state, due=due, attempts=attempts, failures=begun.failures - int(explained), code=told.code)
        )

    def _tell_postponed(self, begun: Begun, failed: Failed, error: Exception) -> None:
        log = _log.error if failed.is_last or not failed.explained else _log.warning
        log(
            "parked event is stuck: an operator must decide" if failed.is_last else "parked event failed again",
            partition=str(self.assignment.partition),
            offset=begun.record.offset,
            attempts=begun.attempts + 1,
            error=failed.error.message,
            exc_info=None if failed.explained else error,
        )

    async def _take_back(self) -> None:
        begun = self._begun
        if begun is not None:
            await self._give_back_parked(begun)
            self._begun = None

    async def _give_back_parked(self, begun: Begun) -> None:
        async with self._workshop.database.transaction() as connection:
            await self._parked.give_back(connection, begun)

    async def _obey(self) -> None:
        """Does what operators want done about parked events."""
        while self._decisions and not self._stopping.is_set():
            offset, discard = self._decisions.pop(0)
            await self._persist(lambda offset=offset, discard=discard: self._release_parked(offset, discard=discard))  # type: ignore[misc]

    async def _release_parked(self, offset: int, *, discard: bool) -> None:
        async with self._workshop.database.transaction() as connection:
            found = await self._parked.release(connection, offset, "discarded" if discard else "retried")
        entry = self._index.get(offset)
        if not found or entry is None:
            return
        _log.info("operator decided", partition=str(self.assignment.partition), offset=offset, discard=discard)
        self._attempts.forget(offset)
        if discard:
            self._attempts.discarded.add(offset)
        self._index.change(replace(entry, state=State.WAITING, due=time.monotonic(), attempts=0, failures=0))

    async def _prune(self) -> None:
        """Forgets what was refused long ago; once in a while, by one partition for all."""
        if self.assignment.partition.partition != 0 or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_AGAIN.total_seconds()
        with suppress(*PASSING):
            async with self._workshop.database.transaction() as connection:
                await parked.prune(connection, self._workshop.keep, rows=_PRUNED_ROWS)


def is_timed_out(error: BaseException | None) -> bool:
    """Whether a handler's time-out is behind an error, also where cutting its statement off broke something else."""
    seen: set[int] = set()  # an error that is raised again while its effect is handled closes a circle
    while error is not None and id(error) not in seen:
        if isinstance(error, HandlerTimeoutError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
