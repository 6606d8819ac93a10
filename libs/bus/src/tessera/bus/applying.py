"""What a transactional consumer does with events inside one transaction: inbox, handlers, refusals, and what is put off.

It decides nothing about positions or commits: that is the loop's (`transactional`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import calling
from tessera.bus.calling import Calls, PostponedError
from tessera.bus.caution import HandlerLimits, LetterGuard
from tessera.bus.deadletters import (
    CONSUMER_CRASHED,
    DISCARDED,
    GIVEN_UP,
    HANDLER_FAILED,
    RETRIES_EXHAUSTED,
    counts_as_ours,
    dead_letter,
    is_refusable,
    refusal,
    refused,
    told_tenant,
)
from tessera.bus.delivery import EXPIRED, UNAVAILABLE, Delivery, expired
from tessera.bus.events import Position, Received
from tessera.bus.inbox import Entry, InboxItem, enter, forget
from tessera.bus.outbox import OutboxRow
from tessera.bus.parked import Chain, Note, Parked, ParkedIndex, State, chain_of, note
from tessera.bus.partitions import Assignment
from tessera.bus.quarantine import Quarantine
from tessera.bus.records import Record
from tessera.bus.registry import Registry
from tessera.bus.retries import next_retry, retry_row
from tessera.bus.transaction import Transaction
from tessera.contracts.base import EventData
from tessera.contracts.errors import InvalidError, Problem, TesseraError
from tessera.contracts.events import RequestFailed
from tessera.contracts.ids import body_digest
from tessera.resilience import RetryPolicy
from tessera.storage import Database
from tessera.telemetry import get_logger, metrics

MAXIMUM_ATTEMPTS: Final = 3
"""Deaths, or failures that no error class explains, before an event goes to the dead letters (rules of the log, 14)."""
_log = get_logger(__name__)


class Outcome(Enum):
    """What became of one event."""

    HANDLED = "handled"
    """Applied, or answered."""
    DEAD = "dead"
    """In the dead letters, without effect."""
    PUT_OFF = "put off"
    """Parked, or in a retry topic; without effect so far."""


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
    limits: HandlerLimits
    guard: LetterGuard
    keep: timedelta
    """How long it is remembered which events were refused."""

    def calls(self, group: str) -> Calls:
        """The handlers, to be called."""
        return Calls(group, self.service, self.registry, self.database, self.limits.handler)


@dataclass(slots=True)
class Attempts:
    """Deaths and failures without a reason, by offset."""

    counts: dict[int, int] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    """Failed here, while the process lived."""
    discarded: set[int] = field(default_factory=set)
    """An operator does not want them any more."""

    def judge(self, offset: int) -> None:
        """Raises InvalidError for an event that must not be tried again."""
        if offset in self.discarded:
            raise InvalidError(DISCARDED, "An operator discarded this event while it was parked.")
        if self.counts.get(offset, 0) <= MAXIMUM_ATTEMPTS:
            return
        if offset in self.broken:
            raise InvalidError(HANDLER_FAILED, f"Handling this event failed {MAXIMUM_ATTEMPTS} times in a way that no rule foresees.")
        raise InvalidError(CONSUMER_CRASHED, f"The consumer died {MAXIMUM_ATTEMPTS} times while it handled this event.")

    def blame(self, offset: int) -> None:
        """Notes a failure without a reason."""
        self.broken.add(offset)
        self.counts[offset] = max(self.counts.get(offset, 0), 1)

    def concern(self, records: Iterable[Record]) -> bool:
        """Whether anything is known of one of them."""
        known = self.counts or self.broken or self.discarded
        return bool(known) and any(
            record.offset in self.counts or record.offset in self.broken or record.offset in self.discarded for record in records
        )

    def forget(self, offset: int) -> None:
        """The event is done."""
        self.counts.pop(offset, None)
        self.broken.discard(offset)
        self.discarded.discard(offset)


@dataclass(slots=True)
class Applied:
    """What a transaction did with the first `handled` events of a batch, and what is to be written before it commits."""

    handled: int = 0
    rows: list[OutboxRow] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    """For the index, once it has committed."""
    done: list[Position] = field(default_factory=list)
    """Events that were noted as delayed and are applied now."""
    replayed: list[Received[EventData]] = field(default_factory=list)
    """Events that an operator replayed and that are applied now."""
    letters: list[bool] = field(default_factory=list)
    """Of each event handled by itself, whether it became a dead letter that is not its producer's fault."""

    @property
    def is_dead(self) -> bool:
        """Whether an event was noted as refused."""
        return any(noted.state in (State.REFUSED, State.DEAD) for noted in self.notes)


class Applier:
    """Applies events of one partition in a transaction that somebody else opens and commits."""

    def __init__(self, assignment: Assignment, workshop: Workshop, index: ParkedIndex, attempts: Attempts) -> None:
        self._assignment = assignment
        self._workshop = workshop
        self._index = index
        self._attempts = attempts
        self._calls = workshop.calls(assignment.group)
        self._backoff = RetryPolicy(attempts=None, initial=workshop.limits.initial, maximum=workshop.limits.maximum)

    def pause(self, attempts: int) -> timedelta:
        """How long a parked event waits after so many attempts."""
        return self._backoff.pause(attempts)

    async def apply(self, connection: AsyncConnection, deliveries: Sequence[Delivery], *, together: bool, postponing: bool) -> Applied:
        """Applies the events in order, as many as the time allows, at least one.

        With `together` they share the transaction without savepoints, and InvalidError ends everything when one is refused. With
        `postponing` an event whose handler fails for a passing reason is put off and the others go on; without, PostponedError ends
        everything. Raises what storage raises, HandlerTimeoutError, FatalError and whatever a handler raises by mistake.
        """
        applied = Applied(len(deliveries))
        queued = {delivery.offset for delivery in deliveries if self._waits(delivery)} if len(self._index) else set()
        fresh = [delivery for delivery in deliveries if delivery.offset not in queued] if queued else deliveries
        pending = await self._entered(connection, fresh, applied)
        done = await self._apply_pending(connection, pending, applied, together=together, postponing=postponing)
        await self._cut(connection, deliveries, pending[done:], applied)
        for delivery in deliveries[: applied.handled]:
            if delivery.offset in queued:
                self._queue(delivery, applied)
        return applied

    async def apply_parked(self, connection: AsyncConnection, delivery: Delivery) -> Applied:
        """Applies the head of a chain. Raises as `apply` does without `postponing`."""
        applied = Applied(1)
        for pending, entry in await self._entered(connection, [delivery], applied):
            await self._settle(connection, pending, entry, applied)
        return applied

    # --- which -----------------------------------------------------------------------------------
    def _waits(self, delivery: Delivery) -> bool:
        """Whether an earlier event of its key is parked. What is no event at all keeps no order."""
        return delivery.event is not None and self._index.blocks(chain_of(delivery.event))

    def _queue(self, delivery: Delivery, applied: Applied) -> None:
        behind = TesseraError("An earlier event of its key waits.", code="key_waits")
        self._park(delivery, behind, applied, attempts=0, due_in=timedelta(0))

    async def _entered(self, connection: AsyncConnection, deliveries: Sequence[Delivery], applied: Applied) -> list[tuple[Delivery, Entry]]:
        """Those that have no effect yet, with what the inbox says."""
        entries = await self._enter(connection, deliveries)
        known = [(delivery, entries.get(delivery.offset, Entry.NEW)) for delivery in deliveries]
        pending: list[tuple[Delivery, Entry]] = [(delivery, entry) for delivery, entry in known if entry is not Entry.REPEATED]
        if len(pending) < len(known):
            metrics.BUS_DUPLICATES.labels(consumer=self._assignment.group).inc(len(known) - len(pending))
            applied.done += [delivery.place for delivery, entry in known if entry is Entry.REPEATED and self._is_repeat(delivery)]
        return pending

    async def _enter(self, connection: AsyncConnection, deliveries: Sequence[Delivery]) -> dict[int, Entry]:
        known = [delivery for delivery in deliveries if delivery.event is not None]
        entries = await enter(connection, self._assignment.group, inbox_items(known))
        return {delivery.offset: self._judged(entry) for delivery, entry in zip(known, entries, strict=True)}

    def _judged(self, entry: Entry) -> Entry:
        """Between services an identity names a step: repeated after a death it may have come to another body (decision 0011)."""
        return Entry.REPEATED if entry is Entry.REUSED and not is_refusable(self._assignment.name) else entry

    def _is_repeat(self, delivery: Delivery) -> bool:
        """Whether it was read from a retry topic."""
        return delivery.place.topic != self._assignment.name

    async def _cut(
        self, connection: AsyncConnection, deliveries: Sequence[Delivery], left: Sequence[tuple[Delivery, Entry]], applied: Applied
    ) -> None:
        """Where the time did not suffice, the batch ends before the first event that is left; the inbox must not know those."""
        if left:
            applied.handled = [delivery.offset for delivery in deliveries].index(left[0][0].offset)
            new = [delivery for delivery, entry in left if entry is Entry.NEW]
            await forget(connection, self._assignment.group, inbox_items(new))

    # --- many ------------------------------------------------------------------------------------
    async def _apply_pending(
        self,
        connection: AsyncConnection,
        pending: Sequence[tuple[Delivery, Entry]],
        applied: Applied,
        *,
        together: bool,
        postponing: bool,
    ) -> int:
        if together and len(pending) > 1 and (events := self._sound(pending)):
            return await self._apply_together(connection, events, pending, applied)
        return await self._apply_each(connection, pending, applied, postponing=postponing)

    def _sound(self, pending: Sequence[tuple[Delivery, Entry]]) -> list[Received[EventData]]:
        """The events of a batch of which none is known to be refused or expired; else nothing."""
        try:
            events = [self._admitted(delivery, entry) for delivery, entry in pending]
        except InvalidError:
            return []
        return [] if any(expired(event) for event in events) else events

    async def _apply_together(
        self,
        connection: AsyncConnection,
        events: Sequence[Received[EventData]],
        pending: Sequence[tuple[Delivery, Entry]],
        applied: Applied,
    ) -> int:
        """Without a savepoint for each, which costs two round trips. Raises InvalidError when one is refused: then none is applied."""
        rows: list[OutboxRow] = []
        done = await self._calls.each(connection, events, rows)
        applied.rows += rows
        for delivery, _ in pending[:done]:
            self._note_done(delivery, applied)
        return done

    def _note_done(self, delivery: Delivery, applied: Applied) -> None:
        """What was noted about an event that is applied now is no longer so."""
        if self._is_repeat(delivery):
            applied.done.append(delivery.place)
        if delivery.event is not None and delivery.is_replay:
            applied.replayed.append(delivery.event)

    async def _apply_each(
        self, connection: AsyncConnection, pending: Sequence[tuple[Delivery, Entry]], applied: Applied, *, postponing: bool
    ) -> int:
        blocked: set[Chain | None] = set()
        until = time.monotonic() + calling.BUDGET.total_seconds()
        for done, (delivery, entry) in enumerate(pending):
            if done and (time.monotonic() > until or sum(applied.letters) >= self._workshop.guard.room):
                return done
            chain = None if delivery.event is None else chain_of(delivery.event)
            if chain is not None and chain in blocked:
                await self._take_back(connection, delivery, entry)
                self._queue(delivery, applied)
                continue
            try:
                outcome = await self._tried(connection, delivery, entry, applied, postponing=postponing)
            except PostponedError:
                if not (done and postponing):
                    raise
                return done  # no room for more: what is parked so far stands
            if outcome is Outcome.PUT_OFF and not self._assignment.topic.order_free:
                blocked.add(chain)
        return len(pending)

    async def _tried(self, connection: AsyncConnection, delivery: Delivery, entry: Entry, applied: Applied, *, postponing: bool) -> Outcome:
        try:
            return await self._settle(connection, delivery, entry, applied)
        except PostponedError as error:
            if not postponing:
                raise
            outcome = await self._put_off(connection, delivery, error, applied)
            if outcome is not Outcome.HANDLED:
                await self._take_back(connection, delivery, entry)
            return outcome

    async def _take_back(self, connection: AsyncConnection, delivery: Delivery, entry: Entry) -> None:
        if entry is Entry.NEW:
            await forget(connection, self._assignment.group, inbox_items([delivery]))

    # --- putting off -----------------------------------------------------------------------------
    async def _put_off(self, connection: AsyncConnection, delivery: Delivery, error: PostponedError, applied: Applied) -> Outcome:
        """Where order matters the key waits here; else the event alone, in a retry topic. After the last one it is a dead letter."""
        if not self._assignment.topic.order_free:
            if len(self._index) + len(applied.parked) >= self._workshop.limits.parked:
                raise error
            self._park(delivery, error, applied, attempts=1, due_in=self.pause(1))
            return Outcome.PUT_OFF
        retry = next_retry(self._assignment.name, self._workshop.service)
        if retry is None:
            fault = InvalidError(RETRIES_EXHAUSTED, f"Every attempt failed, at last: {error.message}"[:2_000])
            return await self._refuse(connection, delivery, fault, applied)
        metrics.BUS_DELAYED.labels(consumer=self._assignment.group).inc()
        _log.warning("event delayed", topic=retry.name, offset=delivery.place.offset, error=error.message)
        applied.rows.append(retry_row(delivery.record, delivery.place, retry, error))
        applied.notes.append(note(delivery.place, State.DELAYED, error, delivery.event, attempts=retry.attempt, due_in=retry.delay))
        return Outcome.PUT_OFF

    def _park(self, delivery: Delivery, error: TesseraError, applied: Applied, *, attempts: int, due_in: timedelta) -> None:
        if attempts:
            _log.warning("event parked", topic=delivery.place.topic, offset=delivery.place.offset, code=error.code, error=error.message)
        event = delivery.ready
        noted = note(delivery.place, State.WAITING, error, event, attempts=attempts, due_in=due_in, record=delivery.record)
        applied.notes.append(noted)
        due = time.monotonic() + due_in.total_seconds()
        applied.parked.append(Parked(delivery.offset, chain_of(event), State.WAITING, due, attempts, code=error.code))

    # --- one -------------------------------------------------------------------------------------
    async def _settle(self, connection: AsyncConnection, delivery: Delivery, entry: Entry, applied: Applied) -> Outcome:
        """Applies one event, or refuses it, in a savepoint of its own."""
        before = len(applied.rows)
        try:
            await self._apply_one(connection, delivery, entry, applied)
        except InvalidError as fault:
            del applied.rows[before:]
            outcome = await self._refuse(connection, delivery, fault, applied)
            if outcome is Outcome.DEAD:
                await self._take_back(connection, delivery, entry)
                return outcome
        except PostponedError:
            del applied.rows[before:]
            raise
        applied.letters.append(False)
        self._note_done(delivery, applied)
        return Outcome.HANDLED

    async def _apply_one(self, connection: AsyncConnection, delivery: Delivery, entry: Entry, applied: Applied) -> None:
        event = self._admitted(delivery, entry)
        if expired(event) and await self._told_expired(connection, event, applied.rows):
            return
        async with connection.begin_nested():
            await self._calls.one(connection, event, applied.rows)

    def _admitted(self, delivery: Delivery, entry: Entry) -> Received[EventData]:
        """The event, unless it does not validate, pretends to be another, or has failed too often."""
        if entry is Entry.REUSED:
            raise InvalidError("event_id_reused", "Another event with another body has the same tenant, source and id.", "id")
        self._attempts.judge(delivery.offset)
        return delivery.ready

    async def _told_expired(self, connection: AsyncConnection, event: Received[EventData], rows: list[OutboxRow]) -> bool:
        """Whoever asked gets an answer, a producer outside a refusal (InvalidError `expired`); what nobody waits for is handled."""
        if event.origin.reply_partition is not None:
            await self._transaction(connection, event, rows).reply(RequestFailed(problem=EXPIRED), step="expired")
            return True
        if is_refusable(self._assignment.name):
            raise InvalidError(EXPIRED.code, "The event's deadline had passed before it was handled; it had no effect.", "deadline")
        return False

    # --- handlers --------------------------------------------------------------------------------
    def _transaction(self, connection: AsyncConnection, event: Received[EventData], rows: list[OutboxRow]) -> Transaction:
        return Transaction(connection, event.origin, self._workshop.service, rows)

    # --- refusing --------------------------------------------------------------------------------
    async def _refuse(self, connection: AsyncConnection, delivery: Delivery, fault: InvalidError, applied: Applied) -> Outcome:
        """Tells whoever must know: the asker of a request; operators, and the producer where there is one outside.

        What is wrong with a request only its asker must know. What was given up is told to operators too: the asker of a command has its
        202 and may not listen any more, and they can have it done.
        """
        record, place, service = delivery.record, delivery.place, self._workshop.service
        metrics.BUS_REFUSED.labels(consumer=self._assignment.group, code=fault.code).inc()
        _log.info("event refused", topic=place.topic, partition=place.partition, offset=place.offset, code=fault.code, field=fault.field)
        event = delivery.event
        if event is not None and event.origin.reply_partition is not None:
            problem = UNAVAILABLE if fault.code == RETRIES_EXHAUSTED else Problem.of(fault)
            await self._transaction(connection, event, applied.rows).reply(RequestFailed(problem=problem), step="failure")
            if fault.code not in GIVEN_UP:
                return Outcome.HANDLED
        attempts = min(MAXIMUM_ATTEMPTS, self._attempts.counts.get(delivery.offset, 1))
        applied.rows.append(dead_letter(record, place.topic, service, fault, attempts))
        applied.notes.append(note(place, State.DEAD if fault.code in GIVEN_UP else State.REFUSED, fault, event))
        applied.letters.append(counts_as_ours(place.topic, fault))
        if is_refusable(place.topic):
            applied.rows.append(refusal(record, place.topic, service, fault))
            await self._note_refusal(connection, delivery, fault)
        return Outcome.DEAD

    async def _note_refusal(self, connection: AsyncConnection, delivery: Delivery, fault: InvalidError) -> None:
        tell, tenant_id = self._workshop.registry.on_refused, told_tenant(delivery.record, delivery.place.topic, fault)
        if tell is not None and tenant_id is not None:
            await tell(tenant_id, refused(delivery.record, delivery.place.topic, fault), connection)


def inbox_items(deliveries: Sequence[Delivery]) -> list[InboxItem]:
    """The identities of those that have one."""
    return [
        InboxItem(delivery.event.tenant_id, delivery.event.digest, body_digest(delivery.record.value or b""))
        for delivery in deliveries
        if delivery.event is not None
    ]
