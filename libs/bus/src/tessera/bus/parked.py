"""Events that came and were not applied: rows of the table `parked`, and what a partition's loop must know of them without asking.

`docs/retries.md` has the states and the invariant.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus.codec import Headers
from tessera.bus.events import Position, Received
from tessera.bus.outbox import pack_headers, unpack_headers
from tessera.bus.records import Record
from tessera.contracts.base import EventData
from tessera.contracts.errors import TesseraError

_LONGEST_MESSAGE: Final = 500


class State(StrEnum):
    """Why an event that came has no effect (yet)."""

    WAITING = "waiting"
    """For its next attempt, or behind an earlier event of its key."""
    STUCK = "stuck"
    """Every attempt failed; an operator decides. Its key waits."""
    DELAYED = "delayed"
    """In a retry topic."""
    REFUSED = "refused"
    """Can never be handled; in the dead letters."""
    DEAD = "dead"
    """Given up after deaths, failures without a reason, the last retry topic, or by an operator; in the dead letters."""


class Chain(NamedTuple):
    """What keeps its order: the events of one key of one tenant on a partition."""

    tenant_id: str
    key: bytes


def chain_of(event: Received[EventData]) -> Chain | None:
    """The chain that an event belongs to; None without a key, where nothing keeps any order."""
    return Chain(event.tenant_id, event.key) if event.key is not None else None


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it came, kept elsewhere than at its place in the log."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Note:
    """A row to be written: one event, and what became of it."""

    place: Position
    """Where the event came first, in the catalogue's spelling."""
    state: State
    code: str
    message: str
    tenant_id: str | None = None
    identity: bytes | None = None
    key: bytes | None = None
    traceparent: str | None = None
    attempts: int = 0
    due_in: timedelta = timedelta(0)
    record: Record | None = None
    """What is to be handled from here; None where it is elsewhere."""


def note(place: Position, state: State, error: TesseraError, event: Received[EventData] | None, **more: Any) -> Note:
    """A note about an event, or about a record that is none."""
    known = (
        {}
        if event is None
        else {"tenant_id": event.tenant_id, "identity": event.digest, "key": event.key, "traceparent": event.traceparent}
    )
    return Note(place, state, error.code[:64], error.message[:_LONGEST_MESSAGE], **{**known, **more})


_WRITE = text(
    'INSERT INTO parked (consumer, topic, partition, "offset", tenant_id, identity, key, state, attempts, due_at, code, message, '
    "traceparent, record_milliseconds, headers, value) "
    'SELECT :consumer, topic, partition, "offset", tenant_id, identity, key, state, attempts, now() + make_interval(secs => due_in), code, '
    "message, traceparent, milliseconds, headers, value FROM unnest(CAST(:topics AS text[]), CAST(:partitions AS integer[]), "
    "CAST(:offsets AS bigint[]), CAST(:tenants AS text[]), CAST(:identities AS bytea[]), CAST(:keys AS bytea[]), CAST(:states AS text[]), "
    "CAST(:attempts AS integer[]), CAST(:dues AS double precision[]), CAST(:codes AS text[]), CAST(:messages AS text[]), "
    "CAST(:traces AS text[]), CAST(:milliseconds AS bigint[]), CAST(:headers AS jsonb[]), CAST(:contents AS bytea[])) "
    'AS given (topic, partition, "offset", tenant_id, identity, key, state, attempts, due_in, code, message, traceparent, milliseconds, '
    "headers, value) "
    'ON CONFLICT (consumer, topic, partition, "offset") DO UPDATE SET state = excluded.state, attempts = excluded.attempts, '
    "due_at = excluded.due_at, code = excluded.code, message = excluded.message, record_milliseconds = excluded.record_milliseconds, "
    "headers = excluded.headers, value = excluded.value, changed_at = now()"
)
_REMOVE = text(
    "DELETE FROM parked USING unnest(CAST(:topics AS text[]), CAST(:partitions AS integer[]), CAST(:offsets AS bigint[])) "
    'AS given (topic, partition, "offset") WHERE parked.consumer = :consumer AND parked.topic = given.topic '
    'AND parked.partition = given.partition AND parked."offset" = given."offset"'
)
_SETTLE = text(
    "DELETE FROM parked USING unnest(CAST(:tenants AS text[]), CAST(:identities AS bytea[])) AS given (tenant_id, identity) "
    "WHERE parked.tenant_id = given.tenant_id AND parked.identity = given.identity AND parked.consumer = :consumer "
    "AND parked.state IN ('refused', 'dead')"
)
_LOAD = text(
    'SELECT "offset", tenant_id, key, state, attempts, failures, code, parked_at, extract(epoch FROM due_at - now()) AS due_in FROM parked '
    "WHERE consumer = :consumer AND topic = :topic AND partition = :partition AND state IN ('waiting', 'stuck') ORDER BY \"offset\""
)
_BEGIN = text(
    "UPDATE parked SET failures = failures + 1, changed_at = now() WHERE consumer = :consumer AND topic = :topic "
    "AND partition = :partition AND \"offset\" = :offset AND state = 'waiting' "
    "RETURNING attempts, failures, key, record_milliseconds, headers::text AS headers, value"
)
_END = text(
    "DELETE FROM parked WHERE consumer = :consumer AND topic = :topic AND partition = :partition "
    "AND \"offset\" = :offset AND failures = :failures AND state = 'waiting'"
)
_POSTPONE = text(
    "UPDATE parked SET failures = failures - :back, attempts = attempts + :spent, state = :state, "
    "code = COALESCE(CAST(:code AS text), code), message = COALESCE(CAST(:message AS text), message), "
    "due_at = now() + make_interval(secs => :due_in), changed_at = now() WHERE consumer = :consumer AND topic = :topic "
    "AND partition = :partition AND \"offset\" = :offset AND failures = :failures AND state = 'waiting'"
)
_RELEASE = text(
    "UPDATE parked SET state = 'waiting', attempts = 0, failures = 0, due_at = now(), code = :code, changed_at = now() "
    "WHERE consumer = :consumer AND topic = :topic AND partition = :partition AND \"offset\" = :offset AND state IN ('waiting', 'stuck')"
)
_PRUNE = text(
    'DELETE FROM parked WHERE (consumer, topic, partition, "offset") IN (SELECT consumer, topic, partition, "offset" FROM parked '
    "WHERE state IN ('refused', 'dead') AND changed_at < now() - make_interval(secs => :age) LIMIT :rows FOR UPDATE SKIP LOCKED)"
)


async def write(connection: AsyncConnection, consumer: str, notes: Sequence[Note]) -> None:
    """Writes the rows; what is known of an event already is replaced."""
    if notes:
        await connection.execute(_WRITE, {"consumer": consumer, **_columns(notes)})


def _columns(notes: Sequence[Note]) -> dict[str, list[Any]]:
    records = [noted.record for noted in notes]
    return {
        **_places([noted.place for noted in notes]),
        "tenants": [noted.tenant_id for noted in notes],
        "identities": [noted.identity for noted in notes],
        "keys": [noted.key for noted in notes],
        "states": [noted.state.value for noted in notes],
        "attempts": [noted.attempts for noted in notes],
        "dues": [noted.due_in.total_seconds() for noted in notes],
        "codes": [noted.code for noted in notes],
        "messages": [noted.message.replace("\x00", "") for noted in notes],
        "traces": [noted.traceparent for noted in notes],
        "milliseconds": [None if record is None else record.timestamp for record in records],
        "headers": [None if record is None else pack_headers(record.headers) for record in records],
        "contents": [None if record is None else record.value or b"" for record in records],
    }


def _places(places: Sequence[Position]) -> dict[str, list[Any]]:
    return {
        "topics": [place.topic for place in places],
        "partitions": [place.partition for place in places],
        "offsets": [place.offset for place in places],
    }


async def remove(connection: AsyncConnection, consumer: str, places: Sequence[Position]) -> None:
    """Deletes the rows of events that have been applied after all."""
    if places:
        await connection.execute(_REMOVE, {"consumer": consumer, **_places(places)})


async def settle(connection: AsyncConnection, consumer: str, events: Sequence[Received[EventData]]) -> None:
    """Deletes what says that these events were refused: replayed, they have been applied."""
    if events:
        identities = {"tenants": [event.tenant_id for event in events], "identities": [event.digest for event in events]}
        await connection.execute(_SETTLE, {"consumer": consumer, **identities})


async def prune(connection: AsyncConnection, older_than: timedelta, *, rows: int) -> int:
    """Deletes up to `rows` old rows of events that nothing is to be done about any more, of every consumer; returns how many."""
    return (await connection.execute(_PRUNE, {"age": older_than.total_seconds(), "rows": rows})).rowcount


@dataclass(frozen=True, slots=True)
class Begun:
    """The head of a chain, taken out for one attempt. `failures` is the token by which only this attempt may end it."""

    record: StoredRecord
    attempts: int
    """Those that failed for a passing reason."""
    failures: int
    """Deaths and failures without a reason, this attempt included."""


@dataclass(frozen=True, slots=True)
class Failed:
    """How an attempt failed. One with a reason (`explained`) spends an attempt; one without stays counted as a failure."""

    error: TesseraError
    due_in: timedelta
    explained: bool
    is_last: bool
    """There is no further attempt: the event is stuck."""


def _failed(begun: Begun, failed: Failed | None) -> dict[str, Any]:
    """Values of the statement; without a failure the attempt is taken back, and what is known of earlier ones stays."""
    return {
        "offset": begun.record.offset,
        "failures": begun.failures,
        "back": int(failed is None or failed.explained),
        "spent": int(failed is not None and failed.explained),
        "state": (State.STUCK if failed and failed.is_last else State.WAITING).value,
        "code": failed and failed.error.code[:64],
        "message": failed and failed.error.message[:_LONGEST_MESSAGE].replace("\x00", ""),
        "due_in": failed.due_in.total_seconds() if failed else 0.0,
    }


@dataclass(frozen=True, slots=True)
class ParkedRows:
    """The rows of one consumer and partition that hold events to be handled."""

    consumer: str
    topic: str
    partition: int

    async def load(self, connection: AsyncConnection) -> list[Parked]:
        """All that wait or are stuck, in order."""
        now = time.monotonic()
        return [_parked(row, now) for row in await connection.execute(_LOAD, self._key())]

    async def begin(self, connection: AsyncConnection, offset: int) -> Begun | None:
        """Counts an attempt before it is made, so that one that kills the process is known; None when there is no such row to handle."""
        row = (await connection.execute(_BEGIN, {**self._key(), "offset": offset})).one_or_none()
        if row is None:
            return None
        headers: Headers = unpack_headers(row.headers)
        key = None if row.key is None else bytes(row.key)
        record = StoredRecord(self.topic, self.partition, offset, row.record_milliseconds, key, bytes(row.value), headers)
        return Begun(record, row.attempts, row.failures)

    async def end(self, connection: AsyncConnection, begun: Begun) -> bool:
        """Deletes the row of an event that was applied; False when another attempt was faster."""
        values = {**self._key(), "offset": begun.record.offset, "failures": begun.failures}
        return bool((await connection.execute(_END, values)).rowcount)

    async def postpone(self, connection: AsyncConnection, begun: Begun, failed: Failed) -> bool:
        """Notes how an attempt failed and when the next one is due; False when another attempt was faster."""
        result = await connection.execute(_POSTPONE, {**self._key(), **_failed(begun, failed)})
        return bool(result.rowcount)

    async def give_back(self, connection: AsyncConnection, begun: Begun) -> None:
        """Takes a counted attempt back that was cut off: it was none."""
        await connection.execute(_POSTPONE, {**self._key(), **_failed(begun, None)})

    async def release(self, connection: AsyncConnection, offset: int, code: str) -> bool:
        """Makes an event due now, with all its attempts before it; `code` says who wants it. False when it is not parked."""
        return bool((await connection.execute(_RELEASE, {**self._key(), "offset": offset, "code": code})).rowcount)

    def _key(self) -> dict[str, Any]:
        return {"consumer": self.consumer, "topic": self.topic, "partition": self.partition}


@dataclass(frozen=True, slots=True)
class Parked:
    """One event that waits here, as far as a loop must know it. `due` is on the clock of `time.monotonic`."""

    offset: int
    chain: Chain | None
    state: State
    due: float
    attempts: int = 0
    failures: int = 0
    code: str = ""
    since: datetime = field(default_factory=lambda: datetime.now(UTC))


def _parked(row: Row[Any], now: float) -> Parked:
    chain = None if row.key is None or row.tenant_id is None else Chain(row.tenant_id, bytes(row.key))
    return Parked(row.offset, chain, State(row.state), now + float(row.due_in), row.attempts, row.failures, row.code, row.parked_at)


class ParkedIndex:
    """What waits on one partition. Invariant: of each chain only the event with the lowest offset is ever due.

    It may know rows that are gone (another replica was faster), never miss one: a row is only added together with a move of the position,
    and a loop whose position is not the stored one loads everything anew.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[int, Parked] = {}
        self._chains: dict[Chain, deque[int]] = {}
        self._heads: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, entries: Iterable[Parked]) -> None:
        """Forgets everything and takes what the table holds, in order."""
        self._entries, self._chains, self._heads = {}, {}, []
        for entry in entries:
            self.add(entry)

    def add(self, entry: Parked) -> None:
        """Notes an event behind all others of its chain. Raises ValueError for an offset below theirs."""
        self._entries[entry.offset] = entry
        if entry.chain is not None:
            chain = self._chains.setdefault(entry.chain, deque())
            if chain and chain[-1] >= entry.offset:
                raise ValueError(f"offset {entry.offset} after {chain[-1]}")
            chain.append(entry.offset)
        self._offer(entry)

    def blocks(self, chain: Chain | None) -> bool:
        """Whether an event of the chain waits, so that later ones must."""
        return chain is not None and chain in self._chains

    def change(self, entry: Parked) -> None:
        """Takes the new state of an event that is known."""
        self._entries[entry.offset] = entry
        self._offer(entry)

    def remove(self, offset: int) -> None:
        """Forgets an event; the next of its chain may go. Nothing happens when it is not known."""
        entry = self._entries.pop(offset, None)
        if entry is None or entry.chain is None:
            return
        chain = self._chains[entry.chain]
        chain.remove(offset)
        if chain:
            self._offer(self._entries[chain[0]])
        else:
            del self._chains[entry.chain]

    def get(self, offset: int) -> Parked | None:
        """What is known of an event."""
        return self._entries.get(offset)

    def due(self) -> Parked | None:
        """The head that is due longest; None when none is due now."""
        self._tidy()
        if self._heads and self._heads[0][0] <= self._clock():
            return self._entries[self._heads[0][1]]
        return None

    def due_in(self) -> timedelta | None:
        """How long until a head is due; None when none will be by itself."""
        self._tidy()
        return timedelta(seconds=max(0.0, self._heads[0][0] - self._clock())) if self._heads else None

    def stuck(self) -> list[Parked]:
        """Those that an operator must decide about, in order."""
        return [entry for entry in self._entries.values() if entry.state is State.STUCK]

    def _offer(self, entry: Parked) -> None:
        if self._is_head(entry):
            heapq.heappush(self._heads, (entry.due, entry.offset))

    def _is_head(self, entry: Parked) -> bool:
        return entry.state is State.WAITING and (entry.chain is None or self._chains[entry.chain][0] == entry.offset)

    def _tidy(self) -> None:
        """Drops what is no longer so from the top of the heap."""
        while self._heads:
            due, offset = self._heads[0]
            entry = self._entries.get(offset)
            if entry is not None and entry.due == due and self._is_head(entry):
                return
            heapq.heappop(self._heads)
