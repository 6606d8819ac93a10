"""The mode transactional: inbox, state, outbox and position of one batch in one Postgres transaction, the group's offset afterwards.

`docs/delivery.md` has the invariant and every point at which the process may die.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from itertools import groupby
from typing import Final

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import faults, outbox
from tessera.bus.deadletters import CONSUMER_CRASHED, HANDLER_FAILED, dead_letter, is_refusable, refusal, refused, told_tenant
from tessera.bus.delivery import EXPIRED, Delivery, delivered, expired, handling, handling_together
from tessera.bus.events import Received
from tessera.bus.inbox import Entry, InboxItem, enter, forget
from tessera.bus.outbox import OutboxRow
from tessera.bus.partitions import BACKOFF, PASSING, Assignment, Gate, PartitionLoop
from tessera.bus.positions import FencedError, Mark, PositionRow
from tessera.bus.publisher import as_retryable
from tessera.bus.quarantine import Quarantine
from tessera.bus.records import Record
from tessera.bus.registry import Registration, Registry
from tessera.bus.transaction import BatchTransaction, Transaction
from tessera.contracts.base import EventData
from tessera.contracts.errors import FatalError, InvalidError, Problem
from tessera.contracts.events import RequestFailed
from tessera.contracts.ids import body_digest
from tessera.storage import Database
from tessera.telemetry import get_logger, metrics

MAXIMUM_ATTEMPTS: Final = 3
"""Deaths, or failures that no error class explains, before an event goes to the dead letters (rules of the log, 14)."""

_GIVE_BACK: Final = timedelta(seconds=5)
"""How long a stopping loop tries to take its mark back while Postgres is away."""

_log = get_logger(__name__)


class Outcome(Enum):
    """What became of one event."""

    HANDLED = "handled"
    """Applied, or answered."""
    DEAD = "dead"
    """In the dead letters, without effect."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all transactional loops of a consumer share."""

    service: str
    database: Database
    registry: Registry
    in_flight: asyncio.Semaphore
    quarantine: Quarantine
    batch_records: int
    commit_every: timedelta


class TransactionalLoop(PartitionLoop):
    """Handles one partition, batch by batch; one by one where an earlier attempt died."""

    def __init__(self, assignment: Assignment, gate: Gate, workshop: Workshop, *, on_fatal: Callable[[FatalError], None]) -> None:
        super().__init__(assignment, gate, high_water=4 * workshop.batch_records, commit_every=workshop.commit_every, on_fatal=on_fatal)
        self._workshop = workshop
        self._row = PositionRow(assignment.group, assignment.name, assignment.partition.partition)
        self._located = False
        self._position = 0
        self._suspects_until = 0
        """Offsets below it were in a batch that died or broke: they are handled one by one."""
        self._attempts: dict[int, int] = {}
        self._redelivered: set[int] = set()
        self._broken: set[int] = set()
        self._marked: Mark | None = None

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

    # --- position ---------------------------------------------------------------------------------
    async def _run(self) -> None:
        await self._persist(self._locate)
        async with self._committing():
            while batch := await self._taken(self._batch_limit()):
                if fresh := [record for record in batch if record.offset >= self._position]:
                    await self._handle(fresh)

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
        stored, mark = await self._stored()
        if stored is None:
            stored = await self._begin()
        start, end = await self._log_bounds()  # after the position, which a replica that is being replaced may still move with the log
        self._check_bounds(stored, start, end)
        self._position, self._located = stored, True
        self._suspect(mark)
        if self._is_assigned():
            self.assignment.consumer.seek(self.assignment.partition, stored)
            self.assignment.consumer.resume(self.assignment.partition)

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
        self._attempts = dict.fromkeys(died, mark.attempts)
        self._redelivered = set(died)
        _log.warning(
            "a batch died before its commit; its events are handled one by one", partition=str(self.assignment.partition), mark=str(mark)
        )

    def _batch_limit(self) -> int:
        return 1 if self._position < self._suspects_until else self._workshop.batch_records

    # --- one batch --------------------------------------------------------------------------------
    async def _handle(self, batch: Sequence[Record]) -> None:
        failures, marked = 0, False
        while not self._stopping.is_set():
            try:
                async with self._room(batch), self._workshop.in_flight:
                    if not marked:
                        await self._mark(batch)
                        marked = True
                    await self._attempt(batch)
            except FencedError:
                await self._requeue(batch)
                return
            except PASSING as error:
                metrics.BUS_RETRIES.labels(consumer=self.assignment.group).inc()
                _log.warning(
                    "batch rolled back, will be tried again", partition=str(self.assignment.partition), error=str(error), failures=failures
                )
            except FatalError:
                raise
            except Exception:  # noqa: BLE001
                _log.exception("batch rolled back by an unexpected error", partition=str(self.assignment.partition), events=len(batch))
                self._blame(batch)
                marked = False  # the next try is one more attempt, and counts
                if len(batch) > 1:
                    await self._one_by_one(batch)
                    return
            else:
                self._finish(batch)
                return
            failures += 1
            await self._pause(failures)

    def _room(self, batch: Sequence[Record]) -> AbstractAsyncContextManager[None]:
        """A suspect is handled alone in the process: else a neighbour's death would count against it."""
        quarantine, first = self._workshop.quarantine, batch[0].offset
        return quarantine.alone() if first < self._suspects_until or first in self._broken else quarantine.together()

    async def _one_by_one(self, batch: Sequence[Record]) -> None:
        """Handles each record of a broken batch in a transaction of its own, so that only the culprit's attempts grow."""
        for record in batch:
            if record.offset >= self._position and not self._stopping.is_set():
                await self._handle([record])

    def _blame(self, batch: Sequence[Record]) -> None:
        for record in batch:
            self._broken.add(record.offset)
            self._attempts[record.offset] = max(self._attempts.get(record.offset, 0), 1)

    async def _requeue(self, batch: Sequence[Record]) -> None:
        """Fenced: looks where the position is now and drops what others have handled. Our mark went with the position that was moved."""
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
        mark = Mark(first, last, self._attempts.get(first, 0) + 1 if len(batch) == 1 else 1)
        self._marked = mark  # before it is known to be set: a commit in doubt is given back too
        async with self._workshop.database.statements() as connection:
            await self._row.set_mark(connection, self._position, mark)
        if len(batch) == 1:
            self._attempts[first] = mark.attempts

    async def _attempt(self, batch: Sequence[Record]) -> None:
        await self._check_gap(batch[0].offset)
        deliveries = [delivered(record, self.assignment) for record in batch]
        try:
            await self._transact(deliveries, together=True)
        except InvalidError:
            # A savepoint around each batch would save this second attempt, but cost every sound batch two round trips.
            await self._transact(deliveries, together=False)
        faults.reach(faults.COMMITTED_BEFORE_OFFSET)

    async def _transact(self, deliveries: Sequence[Delivery], *, together: bool) -> None:
        async with self._workshop.database.transaction() as connection:
            rows = await self._apply(connection, deliveries, together=together)
            await outbox.write(connection, rows)
            await self._row.advance(connection, self._position, deliveries[-1].record.offset + 1)
            faults.reach(faults.CONSUMED_BEFORE_COMMIT)

    async def _check_gap(self, first: int) -> None:
        """A gap is normal (compaction, aborted sends), unless the log's start has overtaken the position."""
        if first > self._position:
            start, _ = await self._log_bounds()
            self._check_bounds(self._position, start, first)

    def _finish(self, batch: Sequence[Record]) -> None:
        self._position, self._marked = batch[-1].offset + 1, None
        for record in batch:
            self._attempts.pop(record.offset, None)
            self._broken.discard(record.offset)
        self.handled_at = time.monotonic()
        metrics.BUS_CONSUMED.labels(consumer=self.assignment.group, topic=self.assignment.topic.name).inc(len(batch))

    async def close(self, grace: timedelta) -> None:
        """Finishes the batch in hand. One that is not finished was not handled: its mark is taken back, or it would count as a death."""
        await super().close(grace)
        await self._commit_finished()
        mark, self._marked = self._marked, None
        if mark is not None:
            with suppress(SQLAlchemyError, TimeoutError):
                async with asyncio.timeout(_GIVE_BACK.total_seconds()):
                    await self._give_back_patiently(mark)

    async def _give_back_patiently(self, mark: Mark) -> None:
        failures = 0
        while True:
            try:
                return await self._give_back(mark)
            except PASSING:
                failures += 1
                await asyncio.sleep(BACKOFF.pause(failures).total_seconds())

    async def _give_back(self, mark: Mark) -> None:
        async with self._workshop.database.transaction() as connection:
            if await self._row.read(connection) != self._position or await self._row.mark(connection) != mark:
                return  # somebody else has the partition, and marks of their own
            if mark.attempts > 1:
                await self._row.set_mark(connection, self._position, Mark(mark.first, mark.last, mark.attempts - 1))
            else:
                await self._row.clear_mark(connection)

    async def _relocate(self) -> None:
        async with self._workshop.database.transaction() as connection:
            stored = await self._row.read(connection)
        if stored is None or stored < self._position:
            raise FatalError(
                f"the position of {self.assignment.group} on {self.assignment.partition} went back from {self._position} to {stored}"
            )
        metrics.BUS_FENCED.labels(consumer=self.assignment.group).inc()
        _log.warning(
            "fenced: another replica handled this partition", partition=str(self.assignment.partition), stored=stored, ours=self._position
        )
        self._position = stored

    # --- one event --------------------------------------------------------------------------------
    async def _apply(self, connection: AsyncConnection, deliveries: Sequence[Delivery], *, together: bool) -> list[OutboxRow]:
        """Applies every event and returns what is to be published, in order. Raises InvalidError when `together` one of them is refused."""
        entries = await self._enter(connection, deliveries)
        known = [(delivery, entries.get(delivery.record.offset, Entry.NEW)) for delivery in deliveries]
        fresh = [(delivery, entry) for delivery, entry in known if entry is not Entry.REPEATED]
        metrics.BUS_DUPLICATES.labels(consumer=self.assignment.group).inc(len(known) - len(fresh))
        if together and len(fresh) > 1 and (events := self._sound(fresh)):
            return await self._apply_together(connection, events)
        rows: list[OutboxRow] = []
        dead: list[Delivery] = []
        for delivery, entry in fresh:
            if await self._apply_one(connection, delivery, entry, rows) is Outcome.DEAD and entry is Entry.NEW:
                dead.append(delivery)
        await forget(connection, self.assignment.group, _inbox_items(dead))
        return rows

    def _sound(self, fresh: Sequence[tuple[Delivery, Entry]]) -> list[Received[EventData]]:
        """The events of a batch of which none is known to be refused or expired; else nothing."""
        try:
            events = [self._admitted(delivery, entry) for delivery, entry in fresh]
        except InvalidError:
            return []
        return [] if any(expired(event) for event in events) else events

    async def _apply_together(self, connection: AsyncConnection, events: Sequence[Received[EventData]]) -> list[OutboxRow]:
        """Without a savepoint for each, which costs two round trips. Raises InvalidError when one is refused: then none is applied."""
        rows: list[OutboxRow] = []
        for event_type, run in groupby(events, lambda event: event.type):
            registration, neighbours = self._workshop.registry[event_type], list(run)
            if registration.batched:
                await self._call_batch(registration, connection, neighbours, rows)
                continue
            for event in neighbours:
                with handling(event, self.assignment.group):
                    await registration.handler(event, self._transaction(connection, event, rows))
        return rows

    async def _call_batch(
        self, registration: Registration, connection: AsyncConnection, events: Sequence[Received[EventData]], rows: list[OutboxRow]
    ) -> None:
        with handling_together(events, self.assignment.group):
            await registration.handler(events, BatchTransaction(connection, self._workshop.service, rows))

    async def _enter(self, connection: AsyncConnection, deliveries: Sequence[Delivery]) -> dict[int, Entry]:
        known = [delivery for delivery in deliveries if delivery.event is not None]
        entries = await enter(connection, self.assignment.group, _inbox_items(known))
        return {delivery.record.offset: entry for delivery, entry in zip(known, entries, strict=True)}

    async def _apply_one(self, connection: AsyncConnection, delivery: Delivery, entry: Entry, rows: list[OutboxRow]) -> Outcome:
        before = len(rows)
        try:
            event = self._admitted(delivery, entry)
            if expired(event) and await self._told_expired(connection, event, rows):
                return Outcome.HANDLED
            registration = self._workshop.registry[event.type]
            async with connection.begin_nested():
                if registration.batched:
                    await self._call_batch(registration, connection, [event], rows)
                else:
                    with handling(event, self.assignment.group):
                        await registration.handler(event, self._transaction(connection, event, rows))
        except InvalidError as fault:
            del rows[before:]
            return await self._refuse(connection, delivery, fault, rows)
        return Outcome.HANDLED

    async def _told_expired(self, connection: AsyncConnection, event: Received[EventData], rows: list[OutboxRow]) -> bool:
        """Whoever asked gets an answer, a producer outside a refusal (InvalidError `expired`); what nobody waits for is handled."""
        if event.origin.reply_partition is not None:
            await self._transaction(connection, event, rows).reply(RequestFailed(problem=EXPIRED), step="expired")
            return True
        if is_refusable(self.assignment.name):
            raise InvalidError(EXPIRED.code, "The event's deadline had passed before it was handled; it had no effect.", "deadline")
        return False

    def _transaction(self, connection: AsyncConnection, event: Received[EventData], rows: list[OutboxRow]) -> Transaction:
        return Transaction(connection, event.origin, self._workshop.service, rows)

    def _admitted(self, delivery: Delivery, entry: Entry) -> Received[EventData]:
        """The event, unless it does not validate, pretends to be another, or has failed too often."""
        record = delivery.record
        if entry is Entry.REUSED:
            raise InvalidError("event_id_reused", "Another event with another body has the same tenant, source and id.", "id")
        if self._attempts.get(record.offset, 0) <= MAXIMUM_ATTEMPTS:
            return delivery.ready
        if record.offset in self._broken:
            raise InvalidError(HANDLER_FAILED, f"Handling this event failed {MAXIMUM_ATTEMPTS} times in a way that no rule foresees.")
        raise InvalidError(CONSUMER_CRASHED, f"The consumer died {MAXIMUM_ATTEMPTS} times while it handled this event.")

    async def _refuse(self, connection: AsyncConnection, delivery: Delivery, fault: InvalidError, rows: list[OutboxRow]) -> Outcome:
        """Tells whoever must know: the asker of a request; else operators, and the producer where there is one outside."""
        record, name, service = delivery.record, self.assignment.name, self._workshop.service
        attempts = min(MAXIMUM_ATTEMPTS, self._attempts.get(record.offset, 1))
        metrics.BUS_REFUSED.labels(consumer=self.assignment.group, code=fault.code).inc()
        _log.info("event refused", topic=name, partition=record.partition, offset=record.offset, code=fault.code, field=fault.field)
        event = delivery.event
        if event is not None and event.origin.reply_partition is not None:
            await self._transaction(connection, event, rows).reply(RequestFailed(problem=Problem.of(fault)), step="failure")
            return Outcome.HANDLED
        rows.append(dead_letter(record, name, service, fault, attempts))
        if is_refusable(name):
            rows.append(refusal(record, name, service, fault))
            await self._note_refusal(connection, record, fault)
        return Outcome.DEAD

    async def _note_refusal(self, connection: AsyncConnection, record: Record, fault: InvalidError) -> None:
        note, tenant_id = self._workshop.registry.on_refused, told_tenant(record, self.assignment.name, fault)
        if note is not None and tenant_id is not None:
            await note(tenant_id, refused(record, self.assignment.name, fault), connection)


def _inbox_items(deliveries: Sequence[Delivery]) -> list[InboxItem]:
    """The identities of those that have one."""
    return [
        InboxItem(delivery.event.tenant_id, delivery.event.digest, body_digest(delivery.record.value or b""))
        for delivery in deliveries
        if delivery.event is not None
    ]
