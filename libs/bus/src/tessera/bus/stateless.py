"""The modes idempotent and reply: repeatable handlers without an inbox.

The offset is committed only up to the finished head, and an event is finished only when everything it emitted is acknowledged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from tessera.bus import faults
from tessera.bus.deadletters import HANDLER_FAILED, dead_letter, is_refusable, refusal
from tessera.bus.delivery import EXPIRED, Delivery, delivered, expired, handling, loose_origin
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
from tessera.contracts.events import RequestFailed
from tessera.resilience import deadline
from tessera.telemetry import bound, get_logger, metrics

MAXIMUM_ATTEMPTS: Final = 3
"""Failures that no error class explains, before an event goes to the dead letters."""
DEFAULT_PATIENCE: Final = timedelta(seconds=30)
"""How long a request without a deadline is tried again."""

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


class StatelessLoop(PartitionLoop):
    """Handles one partition: several events at once where the topic is free of order, else one after the other."""

    def __init__(
        self, assignment: Assignment, gate: Gate, bench: Bench, *, high_water: int, on_fatal: Callable[[FatalError], None]
    ) -> None:
        super().__init__(assignment, gate, high_water=high_water, commit_every=bench.commit_every, on_fatal=on_fatal)
        self._bench = bench
        self._head = OffsetHead()
        self._in_hand: set[asyncio.Task[None]] = set()
        self._failure: FatalError | None = None

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
        await self._bench.window.acquire()
        task = asyncio.create_task(self._carry(record))
        self._in_hand.add(task)
        if not self.assignment.topic.order_free:
            await asyncio.wait({task})

    async def _carry(self, record: Record) -> None:
        """Handles one event to its end. The slot of the window is given back whatever happens."""
        try:
            if await self._handle(delivered(record, self.assignment)):
                self._finish(record)
        except FatalError as error:
            self._failure = error
            self._on_fatal(error)
        finally:
            self._bench.window.release()
            current = asyncio.current_task()
            if current is not None:
                self._in_hand.discard(current)

    def _finish(self, record: Record) -> None:
        faults.reach(faults.EMITTED_BEFORE_OFFSET)
        self._head.finish(record.offset)
        self.handled_at = time.monotonic()
        metrics.BUS_CONSUMED.labels(consumer=self.assignment.group, topic=self.assignment.topic.name).inc()

    # --- one event --------------------------------------------------------------------------------
    async def _handle(self, delivery: Delivery) -> bool:
        """Tries until the event is answered, applied or refused. False when stopping came first."""
        failures = unexplained = 0
        started = time.monotonic()
        while not (failures and self._stopping.is_set()):
            try:
                async with self._bench.quarantine.together():
                    await self._settle(delivery, failures, unexplained, started)
            except FatalError:
                raise
            except PASSING as error:
                _log.warning(
                    "event will be tried again",
                    topic=self.assignment.name,
                    offset=delivery.record.offset,
                    error=str(error),
                    failures=failures,
                )
            except Exception:  # noqa: BLE001
                unexplained += 1
                _log.exception(
                    "handler failed unexpectedly", topic=self.assignment.name, offset=delivery.record.offset, attempt=unexplained
                )
            else:
                return True
            failures += 1
            metrics.BUS_RETRIES.labels(consumer=self.assignment.group).inc()
            await self._wait_before_retry(delivery, failures)
        return False

    async def _wait_before_retry(self, delivery: Delivery, failures: int) -> None:
        """Backs off, but not beyond the deadline of a request."""
        pause = BACKOFF.pause(failures).total_seconds()
        limit = delivery.event.deadline.timestamp() - time.time() if delivery.event and delivery.event.deadline else pause
        self._backing_off = True
        try:
            await self._first(asyncio.sleep(max(0.0, min(pause, limit))))
        finally:
            self._backing_off = False

    async def _settle(self, delivery: Delivery, failures: int, unexplained: int, started: float) -> None:
        """One attempt, with all that it emitted acknowledged."""
        try:
            event = _admitted(delivery, unexplained)
            if self._bench.registry[event.type].mode is Mode.REPLY:
                await self._answer(event, failures, started)
            else:
                await self._apply(event)
        except InvalidError as fault:
            await self._refuse(delivery, fault)

    async def _answer(self, event: Received[EventData], failures: int, started: float) -> None:
        emitter = self._emitter(event)
        if expired(event) or (event.deadline is None and time.monotonic() - started > DEFAULT_PATIENCE.total_seconds()):
            problem = (
                EXPIRED
                if failures == 0
                else Problem(code="dependency_unavailable", message="A dependency did not recover in time.", status=503)
            )
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
            await self._bench.registry[event.type].handler(event, emitter)
            await emitter.settle()

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

    def _asker(self, delivery: Delivery) -> Origin | None:
        if delivery.event is not None:
            return delivery.event.origin if delivery.event.origin.reply_partition is not None else None
        return loose_origin(delivery.record)


def _admitted(delivery: Delivery, unexplained: int) -> Received[EventData]:
    """The event, unless it does not validate or has failed too often."""
    if unexplained >= MAXIMUM_ATTEMPTS:
        raise InvalidError(HANDLER_FAILED, "Handling this event failed repeatedly in a way that no rule foresees.")
    return delivery.ready
