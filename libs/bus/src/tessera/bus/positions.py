"""A transactional consumer's own record of how far it is, and the mark that betrays an event that kills the process."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

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
