"""What a database snapshot shows of a transactional consumer, for `consistency.judge`; and how far the log goes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus.consistency import ParkedEvent, Partition, Seen, Target
from tessera.bus.events import Position
from tessera.bus.publisher import Publisher, as_retryable
from tessera.bus.settings import KafkaSettings
from tessera.bus.stopping import stop_consumer
from tessera.bus.topics import TopicDirectory

_POSITIONS = text(
    "SELECT topic, partition, next_offset FROM consumer_position WHERE consumer = :consumer AND topic = ANY(CAST(:topics AS text[]))"
)
# Of what is parked only the awaited, and the first of each state in each partition: a reader learns nothing from the others.
_PARKED = text(
    'SELECT topic, partition, "offset", identity, state, code, message, parked_at FROM parked '
    "WHERE consumer = :consumer AND tenant_id = :tenant AND (identity = ANY(CAST(:identities AS bytea[])) OR "
    '(topic, partition, "offset") IN (SELECT * FROM unnest(CAST(:topics AS text[]), CAST(:partitions AS integer[]), '
    "CAST(:offsets AS bigint[])))) "
    'UNION (SELECT DISTINCT ON (topic, partition, state) topic, partition, "offset", identity, state, code, message, parked_at '
    "FROM parked WHERE consumer = :consumer AND tenant_id = :tenant AND state NOT IN ('refused', 'dead') "
    'ORDER BY topic, partition, state, "offset") ORDER BY parked_at, "offset"'
)
_INBOX = text(
    "SELECT identity, body FROM inbox WHERE tenant_id = :tenant AND consumer = :consumer AND generation = 1 "
    "AND identity = ANY(CAST(:identities AS bytea[]))"
)
_MOMENTS: Final = 64
_TENANTS: Final = 1_000
"""How many moments of the log's end are remembered, of how many tenants."""


async def seen_in(connection: AsyncConnection, consumer: str, tenant_id: str, topics: Sequence[str], target: Target) -> Seen:
    """What the transaction of `connection` shows of `consumer` (its group) on `topics`, as far as it concerns `target` and this tenant.

    The transaction must be REPEATABLE READ and the one that the answer is read in: then the answer holds what this says.
    """
    identities = [write.identity for write in target.writes]
    values = {"consumer": consumer, "tenant": tenant_id, "identities": identities}
    positions = await connection.execute(_POSITIONS, {"consumer": consumer, "topics": list(topics)})
    parked = await connection.execute(_PARKED, {**values, **_places(target)})
    entered = await connection.execute(_INBOX, values) if target.writes else ()
    return Seen(
        {(row.topic, row.partition): row.next_offset for row in positions},
        [
            ParkedEvent(
                Position(row.topic, row.partition, row.offset),
                row.state,
                row.code,
                row.message,
                bytes(row.identity) if row.identity is not None else None,
            )
            for row in parked
        ],
        {bytes(row.identity): bytes(row.body) for row in entered},
    )


def _places(target: Target) -> dict[str, list[object]]:
    places = [write.place for write in target.writes if write.place is not None]
    return {
        "topics": [place.topic for place in places],
        "partitions": [place.partition for place in places],
        "offsets": [place.offset for place in places],
    }


class LogEnds:
    """Where the log ends now, or ended a moment ago. Connects on first use; for one event loop."""

    def __init__(self, kafka: KafkaSettings, client_id: str, directory: TopicDirectory, publisher: Publisher) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._directory = directory
        self._publisher = publisher
        self._consumer: AIOKafkaConsumer | None = None
        self._connecting = asyncio.Lock()
        self._remembered: dict[tuple[str, ...], deque[tuple[float, dict[Partition, int]]]] = {}

    async def of(self, topics: Sequence[str], *, not_older_than: timedelta = timedelta(0)) -> dict[Partition, int]:
        """The end of every partition of those `topics` that exist, as it was at some moment within `not_older_than` before the call.

        Of the moments that are remembered the oldest, because it is the easiest to reach; else now. Raises RetryableError when Kafka
        does not answer.
        """
        called = time.monotonic()
        remembered = self._remembered.get(tuple(topics), ())
        for moment, ends in remembered:
            if called - moment <= not_older_than.total_seconds():
                return ends
        ends = await self._now(topics)
        # As of the call: whatever was in the log before it is below these ends.
        self._remember(tuple(topics), called, ends)
        return ends

    async def close(self) -> None:
        """Disconnects; the next use would connect again."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await stop_consumer(consumer)

    def _remember(self, topics: tuple[str, ...], moment: float, ends: dict[Partition, int]) -> None:
        """The topics that were asked for last stay: there may be more tenants than are worth remembering."""
        moments = self._remembered.pop(topics, None) or deque(maxlen=_MOMENTS)
        moments.append((moment, ends))
        self._remembered[topics] = moments
        if len(self._remembered) > _TENANTS:
            del self._remembered[next(iter(self._remembered))]

    async def _now(self, topics: Sequence[str]) -> dict[Partition, int]:
        existing = await self._directory.existing(topics)
        counted = await asyncio.gather(*(self._publisher.partitions(topic) for topic in existing))
        places = {
            TopicPartition(self._kafka.physical(topic), partition): (topic, partition)
            for topic, partitions in zip(existing, counted, strict=True)
            for partition in partitions
        }
        consumer = await self._connected()
        with as_retryable():
            ends = await consumer.end_offsets(list(places)) if places else {}
        return {places[place]: end for place, end in ends.items()}

    async def _connected(self) -> AIOKafkaConsumer:
        async with self._connecting:
            if self._consumer is None:
                consumer = AIOKafkaConsumer(**self._kafka.connection(self._client_id), enable_auto_commit=False)
                try:
                    with as_retryable():
                        await consumer.start()
                except BaseException:
                    await stop_consumer(consumer)
                    raise
                self._consumer = consumer
            return self._consumer
