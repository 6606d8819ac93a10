"""The modes idempotent and reply: repeatable handlers without an inbox.

The offset is committed only up to the finished head, and an event is finished only when everything it emitted is acknowledged.
Where order matters it is kept per key: an event that fails holds up its key, not the partition (docs/retries.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from tessera.bus import faults
from tessera.bus.applying import MAXIMUM_ATTEMPTS
from tessera.bus.calling import HandlerTimeoutError, is_own_storage
from tessera.bus.caution import LetterGuard
from tessera.bus.deadletters import DISCARDED, HANDLER_FAILED, counts_as_ours, dead_letter, is_refusable, refusal
from tessera.bus.delivery import EXPIRED, UNAVAILABLE, Delivery, delivered, expired, handling, loose_origin
from tessera.bus.emitting import Emitter
from tessera.bus.events import Origin, Received
from tessera.bus.partitions import BACKOFF, PASSING, Assignment, Gate, PartitionLoop
from tessera.bus.publisher import Publisher
from tessera.bus.quarantine import Quarantine
from tessera.bus.records import Record
from tessera.bus.registry import Registry
from tessera.bus.tracking import OffsetHead
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import Mode
from tessera.contracts.errors import FatalError, InvalidError, Problem
from tessera.contracts.events import RequestFailed, StuckEvent
from tessera.resilience import deadline
from tessera.storage import Database
from tessera.telemetry import bound, get_logger, metrics

DEFAULT_PATIENCE: Final = timedelta(seconds=30)
"""How long a request without a deadline is tried again."""
AHEAD: Final = 500
"""Most events of a partition that are taken beyond the finished head where order matters: so many are handled again after a death."""
_AT_ONCE: Final = 4
"""Keys of a partition that are handled at the same time: a replica's pool of connections is shared with everything else."""
_PROBE: Final = timedelta(seconds=2)
_STUCK_AFTER: Final = 10
"""Failures after which an event that holds up its key is shown as stuck; it is tried again all the same."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all stateless loops of a consumer share."""

    service: str
    publisher: Publisher
    registry: Registry
    window: asyncio.Semaphore
    quarantine: Quarantine
    commit_every: timedelta
    handler_limit: timedelta
    guard: LetterGuard
    database: Database | None


@dataclass(slots=True)
class _Trouble:
    """An event that fails."""

    failures: int
    code: str
    since: datetime
    again: asyncio.Event
    """Set when an operator wants it tried now."""
    discarded: bool = False


class StatelessLoop(PartitionLoop):
    """Handles one partition: several events at once, those of one key one after the other where the topic has an order."""

    def __init__(
        self, assignment: Assignment, gate: Gate, bench: Bench, *, high_water: int, on_fatal: Callable[[FatalError], None]
    ) -> None:
        super().__init__(assignment, gate, high_water=high_water, commit_every=bench.commit_every, on_fatal=on_fatal)
        self._bench = bench
        self._head = OffsetHead()
        self._in_hand: set[asyncio.Task[None]] = set()
        self._failure: FatalError | None = None
        self._chains: dict[bytes, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._trouble: dict[int, _Trouble] = {}
        self._calm = asyncio.Event()
        self._calm.set()

    async def close(self, grace: timedelta) -> None:
        """Finishes and acknowledges what is in hand, commits the finished head; the rest is redelivered."""
        await super().close(grace)
        for task in self._in_hand:
            task.cancel()
        await asyncio.gather(*self._in_hand, return_exceptions=True)
        await self._commit_finished()

    @property
    def position(self) -> int | None:
        """The first event that is not finished; None before the first."""
        if self._head.position is not None or not self._queue:
            return self._head.position if self._head.position is not None else self._head.first
        return self._head.first if self._head.first is not None else self._queue[0].offset

    @property
    def _finished(self) -> int | None:
        return self._head.position

    def _has_work(self) -> bool:
        return bool(self._queue or self._in_hand)

    @property
    def set_aside(self) -> int:
        """Events taken beyond the finished head that are not finished, where some hold up their key."""
        return len(self._in_hand) if self._trouble and not self.assignment.topic.order_free else 0

    def stuck(self) -> list[StuckEvent]:
        """Events that have failed very often and hold up their key."""
        name, number = self.assignment.name, self.assignment.partition.partition
        return [
            StuckEvent(topic=name, partition=number, offset=offset, code=found.code, attempts=found.failures, since=found.since)
            for offset, found in sorted(self._trouble.items())
            if found.failures >= _STUCK_AFTER and not self.assignment.topic.order_free
        ]

    def decide(self, offset: int, *, discard: bool) -> None:
        """An operator's word about an event that fails: try it again now, or make it a dead letter."""
        found = self._trouble.get(offset)
        if found is not None:
            found.discarded = discard
            found.again.set()

    async def _run(self) -> None:
        async with self._committing():
            while taken := await self._taken(1):
                await self._begin(taken[0])
                if self._failure is not None:
                    raise self._failure
            if self._in_hand:
                await asyncio.wait(self._in_hand)

    async def _begin(self, record: Record) -> None:
        self._head.take(record.offset)
        if self.assignment.topic.order_free:
            await self._bench.window.acquire()
            self._start(self._carry(record, self._bench.window))
            return
        before = self._chains.get(record.key) if record.key is not None else None
        task = self._start(self._follow(record, before))
        if record.key is not None:
            self._chains[record.key] = task
        while not self._stopping.is_set() and (self._head.unfinished >= AHEAD or not self._calm.is_set()):
            await self._first(self._something_ends())

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._in_hand.add(task)
        task.add_done_callback(self._in_hand.discard)
        return task

    async def _something_ends(self) -> None:
        """Waits for an event in hand, or for storage to answer again."""
        calm = asyncio.create_task(self._calm.wait())
        try:
            await asyncio.wait({*self._in_hand, *(() if self._calm.is_set() else (calm,))}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            calm.cancel()

    async def _follow(self, record: Record, before: asyncio.Task[None] | None) -> None:
        """Handles an event after the one before it in its key. One that was not finished leaves all after it to the next replica."""
        if before is not None:
            await asyncio.wait({before})
        while self._gate.closed and not self._stopping.is_set():
            await self._first(self._gate.passed())
        if not self._stopping.is_set() and self._failure is None:
            await self._room.acquire()
            await self._carry(record, self._room)
        if record.key is not None and self._chains.get(record.key) is asyncio.current_task():
            del self._chains[record.key]

    async def _carry(self, record: Record, room: asyncio.Semaphore) -> None:
        """Handles one event to its end. The slot is given back whatever happens."""
        try:
            if await self._handle(delivered(record, self.assignment), room):
                self._finish(record)
        except FatalError as error:
            self._failure = error
            self._on_fatal(error)
        finally:
            room.release()
            self._trouble.pop(record.offset, None)

    def _finish(self, record: Record) -> None:
        faults.reach(faults.EMITTED_BEFORE_OFFSET)
        self._head.finish(record.offset)
        self._moved.set()
        self.handled_at = time.monotonic()
        metrics.BUS_CONSUMED.labels(consumer=self.assignment.group, topic=self.assignment.topic.name).inc()

    # --- one event --------------------------------------------------------------------------------
    async def _handle(self, delivery: Delivery, room: asyncio.Semaphore) -> bool:
        """Tries until the event is answered, applied or refused. False when stopping came first."""
        failures = unexplained = 0
        started = time.monotonic()
        while not (failures and self._stopping.is_set()):
            try:
                async with self._bench.quarantine.together():
                    await self._settle(delivery, failures, unexplained, started)
            except FatalError:
                raise
            except Exception as error:  # noqa: BLE001
                unexplained += await self._is_unexplained(error)
                failures += 1
                self._note_failure(delivery, error, failures)
            else:
                self._calm.set()
                return True
            await self._wait_before_retry(delivery, failures, room)
        return False

    async def _is_unexplained(self, error: Exception) -> bool:
        """Whether a failure counts against the event. A time-out does not while the service's own Postgres does not answer either."""
        database = self._bench.database
        if database is not None and isinstance(error, HandlerTimeoutError):
            try:
                async with asyncio.timeout(_PROBE.total_seconds()):
                    await database.check()
            except (*PASSING, TimeoutError):
                return False
        if database is not None and is_own_storage(error, database):
            self._calm.clear()
        return not isinstance(error, PASSING)

    def _note_failure(self, delivery: Delivery, error: Exception, failures: int) -> None:
        metrics.BUS_RETRIES.labels(consumer=self.assignment.group).inc()
        self.handled_at = time.monotonic()  # what fails does not hang
        explained = isinstance(error, PASSING)
        log = _log.warning if explained else _log.error
        log(
            "event will be tried again",
            topic=self.assignment.name,
            offset=delivery.offset,
            error=str(error),
            failures=failures,
            exc_info=None if explained else error,
        )
        found = self._trouble.setdefault(delivery.offset, _Trouble(0, "", datetime.now(UTC), asyncio.Event()))
        found.failures, found.code = failures, getattr(error, "code", "temporarily_unavailable" if explained else HANDLER_FAILED)

    async def _wait_before_retry(self, delivery: Delivery, failures: int, room: asyncio.Semaphore) -> None:
        """Backs off, but not beyond the deadline of a request. Where others may go on meanwhile, they get the slot."""
        pause = BACKOFF.pause(failures).total_seconds()
        limit = delivery.event.deadline.timestamp() - time.time() if delivery.event and delivery.event.deadline else pause
        ordered = not self.assignment.topic.order_free
        self._backing_off = True
        if ordered:
            room.release()
        try:
            await self._first(self._until_again(delivery.offset, max(0.0, min(pause, limit))))
        finally:
            self._backing_off = False
            if ordered:
                await room.acquire()

    async def _until_again(self, offset: int, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._trouble[offset].again.wait()

    async def _settle(self, delivery: Delivery, failures: int, unexplained: int, started: float) -> None:
        """One attempt, with all that it emitted acknowledged."""
        try:
            event = self._admitted(delivery, unexplained)
            if self._bench.registry[event.type].mode is Mode.REPLY:
                await self._answer(event, failures, started)
            else:
                await self._apply(event)
        except InvalidError as fault:
            await self._refuse(delivery, fault)
        else:
            self._bench.guard.passed(1)

    def _admitted(self, delivery: Delivery, unexplained: int) -> Received[EventData]:
        """The event, unless it does not validate, has failed too often, or an operator gave it up."""
        found = self._trouble.get(delivery.offset)
        if found is not None and found.discarded:
            raise InvalidError(DISCARDED, "An operator discarded this event while it was stuck.")
        if unexplained >= MAXIMUM_ATTEMPTS:
            raise InvalidError(HANDLER_FAILED, "Handling this event failed repeatedly in a way that no rule foresees.")
        return delivery.ready

    async def _answer(self, event: Received[EventData], failures: int, started: float) -> None:
        emitter = self._emitter(event)
        if expired(event) or (event.deadline is None and time.monotonic() - started > DEFAULT_PATIENCE.total_seconds()):
            problem = EXPIRED if failures == 0 else UNAVAILABLE
            with bound(request_id=event.request_id, tenant_id=event.tenant_id):
                await emitter.fail(problem)
                await emitter.settle()
            return
        with handling(event, self.assignment.group):
            async with deadline(event.deadline):
                await self._bench.registry[event.type].handler(event, emitter)
                await emitter.settle()
            _log.info("request handled", type=event.type, milliseconds=round((time.monotonic() - started) * 1000, 1))

    async def _apply(self, event: Received[EventData]) -> None:
        emitter = self._emitter(event)
        with handling(event, self.assignment.group):
            await self._limited(event, emitter)
            await emitter.settle()

    async def _limited(self, event: Received[EventData], emitter: Emitter) -> None:
        limit = asyncio.timeout(self._bench.handler_limit.total_seconds())
        try:
            async with limit:
                await self._bench.registry[event.type].handler(event, emitter)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise HandlerTimeoutError(f"a handler took longer than {self._bench.handler_limit.total_seconds():g} s") from error

    def _emitter(self, event: Received[EventData]) -> Emitter:
        return Emitter(self._bench.publisher, event.origin, self._bench.service, event.deadline)

    async def _refuse(self, delivery: Delivery, fault: InvalidError) -> None:
        """Tells the asker of a request; without one, operators (and the producer where there is one outside)."""
        metrics.BUS_REFUSED.labels(consumer=self.assignment.group, code=fault.code).inc()
        _log.info("event refused", topic=self.assignment.name, offset=delivery.record.offset, code=fault.code, field=fault.field)
        origin = self._asker(delivery)
        if origin is not None:
            emitter = Emitter(self._bench.publisher, origin, self._bench.service)
            await emitter.reply(RequestFailed(problem=Problem.of(fault)), step="failure")
            await emitter.settle()
            return
        record, name, service = delivery.record, self.assignment.name, self._bench.service
        rows = [dead_letter(record, name, service, fault, attempts=1)]
        rows += [refusal(record, name, service, fault)] if is_refusable(name) else []
        for row in rows:
            await self._bench.publisher.publish(row.topic, row.encoded, key=row.key)
        self._judge(counts_as_ours(name, fault))

    def _judge(self, is_letter: bool) -> None:
        """Halts the consumer where it only makes dead letters."""
        guard = self._bench.guard
        guard.count([is_letter])
        if guard.reason is not None and not self._gate.closed:
            _log.error("consumer halted", consumer=self.assignment.group, reason=guard.reason)
            self._gate.close()

    def _asker(self, delivery: Delivery) -> Origin | None:
        if delivery.event is not None:
            return delivery.event.origin if delivery.event.origin.reply_partition is not None else None
        return loose_origin(delivery.record)
