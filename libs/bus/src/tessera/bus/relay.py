"""Publishes what transactions left in the outbox: one active relay per service, in the order of the rows, each row at least once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, TypeVar

import asyncpg
from sqlalchemy import text

from tessera.bus import faults
from tessera.bus.codec import Encoded
from tessera.bus.outbox import unpack_headers
from tessera.bus.partitions import BACKOFF, PASSING
from tessera.bus.publisher import Publisher, partition_of
from tessera.bus.settings import ServiceSettings
from tessera.bus.topics import TopicDirectory
from tessera.contracts.errors import InvalidError
from tessera.storage import Database, DirectStatement
from tessera.storage.delivery import outbox_channel
from tessera.telemetry import get_logger, metrics

LEASE: Final = timedelta(seconds=5)
"""A relay that dies is replaced after at most this time."""
_ROWS: Final = 2_000
_BYTES: Final = 16 * 1024 * 1024
"""Most that is read at once, so that rows of 900 KiB do not fill the memory; one row more where the first is larger."""
_IDLE_SECONDS: Final = 1.0
_TOLD_SECONDS: Final = 5.0
"""How often it is told that Kafka keeps the relay waiting."""
_NAME: Final = "outbox"

_CLAIM = text(
    "INSERT INTO relay_lease (name, holder, epoch, expires_at) VALUES (:name, :holder, 1, now() + make_interval(secs => :seconds)) "
    "ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at, "
    "epoch = relay_lease.epoch + CASE WHEN relay_lease.holder = excluded.holder THEN 0 ELSE 1 END "
    "WHERE relay_lease.holder = excluded.holder OR relay_lease.expires_at < now() RETURNING epoch"
)
_GIVE_UP = text("DELETE FROM relay_lease WHERE name = :name AND holder = :holder")
# Rows are told apart by their ids, never by "above the last one": a smaller id may be committed later.
# Not worth waiting for the disk: rows that a dying Postgres brings back are published once more, under their ids.
_DELETE_AND_READ = DirectStatement(
    "WITH unhurried AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)), "
    "published AS (DELETE FROM outbox USING unhurried WHERE id = ANY(CAST(:published AS bigint[]))) "
    "SELECT id, topic, partition, key, headers, value FROM ("
    "SELECT id, topic, partition, key, headers::text AS headers, value, "
    "sum(octet_length(value)) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before "
    "FROM (SELECT * FROM outbox WHERE id NOT IN (SELECT unnest(CAST(:known AS bigint[]))) ORDER BY id LIMIT :rows) AS oldest) AS given "
    "WHERE before IS NULL OR before < :bytes ORDER BY id"
)

_log = get_logger(__name__)

T = TypeVar("T")
Lane = tuple[str, int]
"""A topic and one of its partitions."""
OutboxRecord = Mapping[str, Any]
Rows = Sequence[OutboxRecord]


class Relay:
    """Runs beside the consumers. Its order per key is the order of the rows, because one relay sends through one idempotent producer.

    A lease that lapses while rows are on their way makes two relays publish them: consumers recognise the repeats by their ids.
    """

    def __init__(self, settings: ServiceSettings, database: Database, publisher: Publisher, directory: TopicDirectory) -> None:
        self._service = settings.service
        self._holder = settings.instance
        self._database = database
        self._publisher = publisher
        self._directory = directory
        self._woken = asyncio.Event()
        self._listening: asyncpg.Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._held_until = float("-inf")
        self._published: list[int] = []
        """Acknowledged rows that are not deleted yet."""

    def start(self) -> None:
        """Starts the loop."""
        self._task = asyncio.create_task(self._run(), name="outbox-relay")

    async def stop(self) -> None:
        """Sends what the outbox holds now, as far as that succeeds at once, and gives the lease up."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with suppress(*PASSING):
            if await self._claimed():
                await self._publish_all()
            async with self._database.transaction() as connection:
                await connection.execute(_GIVE_UP, {"name": _NAME, "holder": self._holder})
        await self._unlisten()

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                await self._turn()
                failures = 0
            except PASSING as error:
                failures += 1
                _log.warning("outbox relay waits", error=str(error), failures=failures)
                await asyncio.sleep(BACKOFF.pause(failures).total_seconds())
            except Exception:  # noqa: BLE001
                # The relay is the only way out of the outbox: whatever happens, it goes on, and says so.
                failures += 1
                _log.exception("outbox relay failed", failures=failures)
                await asyncio.sleep(BACKOFF.pause(failures).total_seconds())

    async def _turn(self) -> None:
        await self._listen()
        self._woken.clear()
        if await self._claimed():
            await self._publish_all()
        await self._wait()

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_SECONDS):
                await self._woken.wait()

    async def _claimed(self) -> bool:
        """Takes the lease, or renews it once half of it has passed."""
        now = time.monotonic()
        if now < self._held_until - LEASE.total_seconds() / 2:
            return True
        values = {"name": _NAME, "holder": self._holder, "seconds": LEASE.total_seconds()}
        async with self._database.transaction() as connection:
            held = (await connection.execute(_CLAIM, values)).scalar_one_or_none() is not None
        self._held_until = now + LEASE.total_seconds() if held else float("-inf")
        return held

    async def _publish_all(self) -> None:
        """Publishes and deletes until nothing is left, or the lease is lost. Raises when some could not be published: they stay."""
        rows = await self._next()
        while rows:
            ahead = asyncio.create_task(self._next(rows), name="outbox-relay-ahead") if _is_full(rows) else None
            try:
                await self._publish(rows)
                held = await self._claimed()
                rows = await (ahead or self._next())
            finally:
                if ahead is not None:
                    ahead.cancel()
                    await asyncio.gather(ahead, return_exceptions=True)
            if not held:
                if self._published:
                    await self._next()
                return

    async def _next(self, in_flight: Rows = ()) -> Rows:
        """Deletes what was published; the oldest rows beside those in flight, which may be read while those are being published."""
        published = self._published
        known = [*published, *(row["id"] for row in in_flight)]
        values = {"published": published, "known": known, "rows": _ROWS, "bytes": _BYTES}
        async with self._database.driver() as driver:
            rows = await _DELETE_AND_READ.rows(driver, values)
        self._published = self._published[len(published) :]
        return rows

    async def _publish(self, rows: Rows) -> None:
        """What was acknowledged is deleted with the next read, also where something was not."""
        faults.reach(faults.RELAY_READ_BEFORE_PUBLISH)
        lanes = await self._lanes(rows)
        published: list[int] = []
        outcomes = await _told(asyncio.gather(*(self._publish_lane(*lane, published) for lane in lanes.items()), return_exceptions=True))
        faults.reach(faults.RELAY_PUBLISHED_BEFORE_DELETE)
        self._published = [*self._published, *published]
        metrics.BUS_RELAYED.inc(len(published))
        for error in outcomes:
            if error is not None:
                raise error

    async def _lanes(self, rows: Rows) -> dict[Lane, list[OutboxRecord]]:
        """The rows by topic and partition, in their order."""
        targets = {topic: await self._target(topic) for topic in {row["topic"] for row in rows}}
        partitions = {topic: sorted(await self._publisher.partitions(topic)) for topic in set(targets.values())}
        lanes: dict[Lane, list[OutboxRecord]] = {}
        for row in rows:
            target = targets[row["topic"]]
            lanes.setdefault((target, _partition(row, partitions[target])), []).append(row)
        return lanes

    async def _publish_lane(self, lane: Lane, rows: Rows, published: list[int]) -> None:
        """One batch after the other, each acknowledged before the next is sent: no row can overtake an earlier one of its partition."""
        topic, partition = lane
        records = [(row["key"], Encoded(unpack_headers(row["headers"]), row["value"])) for row in rows]
        done = 0
        while done < len(rows):
            try:
                taken = await self._publisher.publish_batch(topic, partition, records[done:])
            except InvalidError:
                _log.exception("a row of the outbox can never be published and blocks it", row=rows[done]["id"], topic=topic)
                raise
            published.extend(row["id"] for row in rows[done : done + taken])
            done += taken

    async def _target(self, topic: str) -> str:
        """A tenant's refusals go to the shared topic until the tenant has its own: an unknown tenant must not be able to make topics."""
        if topic.startswith("refused.") and not await self._directory.exists(topic):
            return "refused"
        return topic

    async def _listen(self) -> None:
        if self._listening is not None and not self._listening.is_closed():
            return
        connection = await self._database.connect()
        await connection.add_listener(outbox_channel(self._service), self._wake)
        self._listening = connection

    async def _unlisten(self) -> None:
        connection, self._listening = self._listening, None
        if connection is not None:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                await connection.close(timeout=2)

    def _wake(self, *_: Any) -> None:
        self._woken.set()


async def _told(outcomes: asyncio.Future[T]) -> T:
    """The outcomes, however long that takes (Kafka's client sends again and again what it has numbered); meanwhile operators are told."""
    try:
        while not (await asyncio.wait({outcomes}, timeout=_TOLD_SECONDS))[0]:
            _log.warning("outbox relay waits", error="Kafka has not acknowledged what was sent")
        return outcomes.result()
    finally:
        if not outcomes.done():
            outcomes.cancel()
            await asyncio.gather(outcomes, return_exceptions=True)


def _is_full(rows: Rows) -> bool:
    """Whether there may be more."""
    return len(rows) == _ROWS or sum(len(row["value"]) for row in rows) >= _BYTES


def _partition(row: OutboxRecord, partitions: Sequence[int]) -> int:
    """Where the row says, else where its key belongs; anywhere without a key."""
    if row["partition"] is not None:
        return int(row["partition"])
    return random.choice(partitions) if row["key"] is None else partition_of(row["key"], partitions)  # noqa: S311  # nosec B311 - no secret
