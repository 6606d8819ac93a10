"""A transactional consumer's own record of how far it is, and the mark that betrays an event that kills the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import outbox
from tessera.bus.outbox import OutboxRow
from tessera.contracts.errors import RetryableError
from tessera.storage import DirectStatement, driver_of

_POSITION = text("SELECT next_offset FROM consumer_position WHERE consumer = :consumer AND topic = :topic AND partition = :partition")
_LOCK = text(
    "SELECT next_offset FROM consumer_position WHERE consumer = :consumer AND topic = :topic AND partition = :partition FOR UPDATE"
)
_BEGIN = text(
    "INSERT INTO consumer_position (consumer, topic, partition, next_offset) VALUES (:consumer, :topic, :partition, :next_offset) "
    "ON CONFLICT DO NOTHING"
)
_ADVANCE = DirectStatement(
    "WITH moved AS (UPDATE consumer_position SET next_offset = :next_offset "
    "WHERE consumer = :consumer AND topic = :topic AND partition = :partition AND next_offset = :stored RETURNING next_offset), "
    "cleared AS (DELETE FROM batch_mark WHERE consumer = :consumer AND topic = :topic AND partition = :partition) "
    "SELECT count(*) AS moved FROM moved"
)
_ADVANCE_AND_MARK = DirectStatement(
    "WITH moved AS (UPDATE consumer_position SET next_offset = :next_offset "
    "WHERE consumer = :consumer AND topic = :topic AND partition = :partition AND next_offset = :stored "
    "RETURNING consumer, topic, partition), "
    "marked AS (INSERT INTO batch_mark (consumer, topic, partition, first_offset, last_offset, attempts) "
    "SELECT consumer, topic, partition, CAST(:first AS bigint), CAST(:last AS bigint), CAST(:attempts AS integer) FROM moved "
    "ON CONFLICT (consumer, topic, partition) DO UPDATE SET first_offset = excluded.first_offset, last_offset = excluded.last_offset, "
    "attempts = excluded.attempts, marked_at = now()) "
    "SELECT count(*) AS moved FROM moved"
)
_MARK = text(
    "SELECT first_offset, last_offset, attempts FROM batch_mark WHERE consumer = :consumer AND topic = :topic AND partition = :partition"
)
# Not worth waiting for the disk: a mark tells of a process that died, and outlives that; a Postgres that dies too may forget it.
_SET_MARK = DirectStatement(
    "WITH marked AS (INSERT INTO batch_mark (consumer, topic, partition, first_offset, last_offset, attempts) "
    "SELECT consumer, topic, partition, CAST(:first AS bigint), CAST(:last AS bigint), CAST(:attempts AS integer) FROM consumer_position "
    "WHERE consumer = :consumer AND topic = :topic AND partition = :partition AND next_offset = :stored "
    "AND set_config('synchronous_commit', 'off', true) IS NOT NULL FOR SHARE "
    "ON CONFLICT (consumer, topic, partition) DO UPDATE SET first_offset = excluded.first_offset, last_offset = excluded.last_offset, "
    "attempts = excluded.attempts, marked_at = now() RETURNING first_offset) "
    "SELECT count(*) AS marked FROM marked"
)
# Of several partitions at once. Rows are locked in their order, so that two of these statements wait for each other and never in a circle.
_SET_MARKS = DirectStatement(
    "WITH held AS (SELECT given.topic, given.partition, given.first, given.last FROM unnest(CAST(:on_topics AS text[]), "
    "CAST(:on_partitions AS integer[]), CAST(:stored AS bigint[]), CAST(:firsts AS bigint[]), CAST(:lasts AS bigint[])) "
    "AS given (topic, partition, stored, first, last) JOIN consumer_position ON consumer_position.consumer = :consumer "
    "AND consumer_position.topic = given.topic AND consumer_position.partition = given.partition "
    "AND consumer_position.next_offset = given.stored WHERE set_config('synchronous_commit', 'off', true) IS NOT NULL "
    "ORDER BY given.topic, given.partition FOR SHARE OF consumer_position) "
    "INSERT INTO batch_mark (consumer, topic, partition, first_offset, last_offset, attempts) "
    "SELECT :consumer, topic, partition, first, last, 1 FROM held "
    "ON CONFLICT (consumer, topic, partition) DO UPDATE SET first_offset = excluded.first_offset, last_offset = excluded.last_offset, "
    "attempts = excluded.attempts, marked_at = now() RETURNING topic, partition"
)
_MOVES = (
    "WITH given AS (SELECT * FROM unnest(CAST(:on_topics AS text[]), CAST(:on_partitions AS integer[]), CAST(:stored AS bigint[]), "
    "CAST(:next_offsets AS bigint[]), CAST(:firsts AS bigint[]), CAST(:lasts AS bigint[])) "
    "AS given (topic, partition, stored, next_offset, first, last)), "
    "held AS (SELECT given.* FROM given JOIN consumer_position ON consumer_position.consumer = :consumer "
    "AND consumer_position.topic = given.topic AND consumer_position.partition = given.partition "
    "AND consumer_position.next_offset = given.stored ORDER BY given.topic, given.partition FOR UPDATE OF consumer_position), "
    "moved AS (UPDATE consumer_position SET next_offset = held.next_offset FROM held WHERE consumer_position.consumer = :consumer "
    "AND consumer_position.topic = held.topic AND consumer_position.partition = held.partition "
    "AND consumer_position.next_offset = held.stored RETURNING held.topic, held.partition, held.first, held.last), "
    "cleared AS (DELETE FROM batch_mark USING given WHERE batch_mark.consumer = :consumer AND batch_mark.topic = given.topic "
    "AND batch_mark.partition = given.partition AND given.first IS NULL), "
    "marked AS (INSERT INTO batch_mark (consumer, topic, partition, first_offset, last_offset, attempts) "
    "SELECT :consumer, topic, partition, first, last, 1 FROM moved WHERE first IS NOT NULL "
    "ON CONFLICT (consumer, topic, partition) DO UPDATE SET first_offset = excluded.first_offset, last_offset = excluded.last_offset, "
    "attempts = excluded.attempts, marked_at = now())"
)
_ADVANCE_ALL = DirectStatement(f"{_MOVES} SELECT count(*) AS moved FROM moved")  # noqa: S608 - no part of it comes from outside
_ADVANCE_ALL_AND_PUBLISH = DirectStatement(
    f"{_MOVES}, published AS ({outbox.INSERT}) SELECT count(*) AS moved FROM moved"  # noqa: S608 - the same
)
_CLEAR_MARK = text("DELETE FROM batch_mark WHERE consumer = :consumer AND topic = :topic AND partition = :partition")


class FencedError(RetryableError):
    """Somebody else moved the position: this consumer must look again before it does anything."""

    code = "position_fenced"


@dataclass(frozen=True, slots=True)
class Mark:
    """A batch that was begun: offsets `first` to `last`, both included, for the `attempts`-th time."""

    first: int
    last: int
    attempts: int = 1

    def values(self) -> dict[str, object]:
        """What statements need."""
        return {"first": self.first, "last": self.last, "attempts": self.attempts}


@dataclass(frozen=True, slots=True)
class PositionRow:
    """The rows of one consumer and partition."""

    consumer: str
    topic: str
    partition: int

    async def read(self, connection: AsyncConnection) -> int | None:
        """The next offset to handle; None before the first."""
        found: int | None = (await connection.execute(_POSITION, self._key())).scalar_one_or_none()
        return found

    async def begin(self, connection: AsyncConnection, next_offset: int) -> None:
        """Writes the first position, unless somebody did already."""
        await connection.execute(_BEGIN, {**self._key(), "next_offset": next_offset})

    async def advance(self, connection: AsyncConnection, stored: int, next_offset: int, following: Mark | None = None) -> None:
        """Moves the position, and takes the batch's mark away or puts that of the following batch in its place.

        Raises FencedError when the position is no longer at `stored`: then nothing of this transaction may stand.
        """
        values = {**self._key(), "stored": stored, "next_offset": next_offset}
        if following is None:
            result = await _ADVANCE.row(driver_of(connection), values)
        else:
            result = await _ADVANCE_AND_MARK.row(driver_of(connection), {**values, **following.values()})
        if result["moved"] != 1:
            raise self._fenced(stored)

    async def hold(self, connection: AsyncConnection, stored: int) -> None:
        """Keeps the position where it is until the transaction ends. Raises FencedError when it is no longer at `stored`."""
        found = (await connection.execute(_LOCK, self._key())).scalar_one_or_none()
        if found != stored:
            raise FencedError(f"The position of {self.consumer} on {self.topic}/{self.partition} is no longer {stored}.")

    async def mark(self, connection: AsyncConnection) -> Mark | None:
        """The mark of a batch that was begun and neither finished nor given back."""
        row = (await connection.execute(_MARK, self._key())).one_or_none()
        return Mark(row.first_offset, row.last_offset, row.attempts) if row else None

    async def set_mark(self, driver: asyncpg.Connection, stored: int, mark: Mark) -> None:
        """Says which batch is about to be handled. Raises FencedError when the position is no longer at `stored`.

        A mark set by a replica that lost the partition would look like the death of whoever has it now.
        """
        result = await _SET_MARK.row(driver, {**self._key(), "stored": stored, **mark.values()})
        if result["marked"] != 1:
            raise self._fenced(stored)

    async def clear_mark(self, connection: AsyncConnection) -> None:
        """Says that the batch was given back."""
        await connection.execute(_CLEAR_MARK, self._key())

    def _fenced(self, stored: int) -> FencedError:
        return FencedError(f"The position of {self.consumer} on {self.topic}/{self.partition} is no longer {stored}.")

    def _key(self) -> dict[str, object]:
        return {"consumer": self.consumer, "topic": self.topic, "partition": self.partition}


@dataclass(frozen=True, slots=True)
class Move:
    """How a transaction moves one position, and which batch it marks in place of the one that is done."""

    row: PositionRow
    stored: int
    next_offset: int
    following: Mark | None = None


async def set_marks(driver: asyncpg.Connection, consumer: str, marks: Sequence[tuple[PositionRow, int, Mark]]) -> set[PositionRow]:
    """Says of several partitions which batch is about to be handled, each for the first time: (row, stored position, mark).

    Returns those that are marked; the position of any other is no longer where it was said to be.
    """
    values = {
        "consumer": consumer,
        "on_topics": [row.topic for row, _, _ in marks],
        "on_partitions": [row.partition for row, _, _ in marks],
        "stored": [stored for _, stored, _ in marks],
        "firsts": [mark.first for _, _, mark in marks],
        "lasts": [mark.last for _, _, mark in marks],
    }
    return {PositionRow(consumer, row["topic"], row["partition"]) for row in await _SET_MARKS.rows(driver, values)}


async def advance_all(connection: AsyncConnection, consumer: str, moves: Sequence[Move], rows: Sequence[OutboxRow]) -> None:
    """Moves several positions as `PositionRow.advance` moves one, and writes the rows to be published.

    Raises FencedError unless every one of them is where it was read: then nothing of this transaction may stand.
    """
    values = {
        "consumer": consumer,
        "on_topics": [move.row.topic for move in moves],
        "on_partitions": [move.row.partition for move in moves],
        "stored": [move.stored for move in moves],
        "next_offsets": [move.next_offset for move in moves],
        "firsts": [move.following and move.following.first for move in moves],
        "lasts": [move.following and move.following.last for move in moves],
    }
    statement = _ADVANCE_ALL_AND_PUBLISH if rows else _ADVANCE_ALL
    result = await statement.row(driver_of(connection), {**values, **outbox.columns(rows)})
    if result["moved"] != len(moves):
        raise FencedError(f"Of {len(moves)} positions of {consumer} only {result['moved']} are where they were.")
