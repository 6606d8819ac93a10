"""Reads that must hold something: they are answered from the snapshot that proves it, or not at all (docs/consistency.md)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from tessera.bus import Emitter, Position, Received
from tessera.bus.consistency import SATISFIED, Partition, Seen, Standing, Target, Write, judge, reached
from tessera.bus.waiting import WaitingRoom
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import AwaitedWrite, Freshness, LogEnd, ReadConsistency, SearchStage
from tessera.memory.domain.freshness import Indexing, Tasks, searchable, suffices
from tessera.memory.ports import LogEnds, MemoryStore, Snapshot, ingestion_topics
from tessera.resilience import ResilienceError
from tessera.telemetry import get_logger, metrics

T = TypeVar("T")
Answer = Callable[[Snapshot, Freshness], Awaitable[EventData]]

EVENTUAL: Final = ReadConsistency(level="eventual")
_MARGIN_SECONDS: Final = 0.2
"""Kept of a request's deadline for the answer's way back."""
_UNAVAILABLE: Final = Problem(code="dependency_unavailable", message="A dependency did not recover in time.", status=503)

_log = get_logger(__name__)


@dataclass(slots=True)
class Reading:
    """One read, which may have to look several times."""

    target: Target
    stage: SearchStage | None = "words"
    _horizon: Tasks | None = field(default=None, init=False)

    def freshness(self, seen: Seen, indexing: Indexing, as_of: datetime) -> Freshness:
        """What can be said of the snapshot that shows all of this."""
        judgement = judge(self.target, seen)
        found = self._searchable(indexing) if judgement.standing is Standing.SATISFIED else None
        if judgement.standing is Standing.SATISFIED and not self._found(found):
            return Freshness(standing="behind", as_of=as_of, ends=_ends(reached(seen)), searchable=found, awaited=_ends(self.target.ends))
        return Freshness(
            standing=judgement.standing.value,
            as_of=as_of,
            ends=_ends(reached(seen)),
            searchable=found,
            reason=judgement.reason,
            awaited=_ends(self.target.ends),
            waiting_may_help=judgement.waiting_may_help,
        )

    def _found(self, found: SearchStage | None) -> bool:
        return not (self.target.writes or self.target.ends) or suffices(found, self.stage)

    def _searchable(self, indexing: Indexing) -> SearchStage | None:
        """Of what is awaited; of everything where nothing is."""
        if self.target.writes and not self.target.ends:
            return searchable(indexing.awaited)
        if self._horizon is None:
            # Everything below the ends has asked for its index work by now; what others ask for later is not waited for.
            self._horizon = dict(indexing.newest)
        return searchable(indexing.awaited | indexing.left_up_to(self._horizon))


@dataclass(frozen=True, slots=True)
class Readers:
    """Where fresh reads are made, and wait."""

    store: MemoryStore
    log_ends: LogEnds
    room: WaitingRoom = field(default_factory=WaitingRoom)

    async def reading(self, tenant_id: str, wanted: ReadConsistency) -> Reading:
        """What must be seen. Looks where the log ends, where that is asked for. Raises RetryableError when Kafka does not answer."""
        ends: Mapping[Partition, int] = {}
        age = timedelta(0) if wanted.level == "strong" else _seconds(wanted.maximum_age_seconds)
        if age is not None:
            ends = await self.log_ends.of(ingestion_topics(tenant_id), not_older_than=age)
        return Reading(target_of(wanted, tenant_id, ends), wanted.stage)

    async def look(
        self, tenant_id: str, reading: Reading, answer: Callable[[Snapshot, Freshness], Awaitable[T]]
    ) -> tuple[Freshness, T | None]:
        """One look: the answer, read in the snapshot that proves its freshness, or None where the snapshot does not hold what it must."""
        as_of = datetime.now(UTC)
        async with self.store.snapshot(tenant_id) as snapshot:
            freshness = reading.freshness(await snapshot.seen(reading.target), await snapshot.indexing(reading.target), as_of)
            return freshness, await answer(snapshot, freshness) if freshness.standing == SATISFIED.standing.value else None

    async def reply(
        self,
        event: Received[EventData],
        wanted: ReadConsistency,
        emit: Emitter,
        answer: Answer,
        without: Callable[[Freshness], EventData],
    ) -> None:
        """Replies with the answer when it holds what is wanted, or with what `without` says when that is known not to be in time.

        Looks once before it returns. Who has to wait longer waits outside: the request is done for its consumer. A process that dies
        then leaves the asker without an answer, and it asks again.
        """
        until = _until(event, wanted)
        reading = await self.reading(event.tenant_id, wanted)
        freshness, found = await self.look(event.tenant_id, reading, answer)
        waits = found is None and freshness.waiting_may_help and _clock() < until
        if not waits or not self.room.admits(event.tenant_id):
            if wanted.level != "eventual":
                _count_standing(freshness)
            await emit.reply(found or without(freshness))
            return

        async def attempt(last: bool) -> bool:
            return await self._attempt(event.tenant_id, reading, emit, answer, without, last=last)

        self.room.admit(event.tenant_id, attempt, until)

    async def _attempt(
        self, tenant_id: str, reading: Reading, emit: Emitter, answer: Answer, without: Callable[[Freshness], EventData], *, last: bool
    ) -> bool:
        try:
            freshness, found = await self.look(tenant_id, reading, answer)
            if found is None and freshness.waiting_may_help and not last:
                return False
            await emit.reply(found or without(freshness))
            await emit.settle()
        except (RetryableError, ResilienceError) as error:
            if last:
                await _give_up(emit, error)
            return last
        _count_standing(freshness)
        return True


async def _give_up(emit: Emitter, error: Exception) -> None:
    """Says so, if even that is possible: the asker has a limit of its own."""
    _log.warning("a reader waited in vain", error=str(error))
    with suppress(RetryableError):
        await emit.fail(_UNAVAILABLE)
        await emit.settle()


def _count_standing(freshness: Freshness) -> None:
    metrics.FRESH_READS.labels(standing=freshness.standing).inc()


def target_of(wanted: ReadConsistency, tenant_id: str, log_ends: Mapping[Partition, int]) -> Target:
    """What the snapshot must hold. Topics that this tenant's events never come on are nothing to wait for: they are left out."""
    topics = ingestion_topics(tenant_id)
    ends = {(end.topic, end.partition): end.next_offset for end in wanted.ends if end.topic in topics}
    return Target([_write(write) for write in wanted.writes], {**ends, **log_ends})


def not_fresh(freshness: Freshness) -> Problem:
    """The failure of a request that has no answer of its own for that."""
    reason = f" {freshness.reason.code}: {freshness.reason.message}" if freshness.reason else ""
    if freshness.standing == "refused":
        return Problem(code="write_refused", message=f"What was to be read was refused.{reason}"[:2_000], status=409)
    if freshness.standing == "pending":
        return Problem(code="write_pending", message=f"What was to be read is parked.{reason}"[:2_000], status=503)
    return Problem(code="not_up_to_bound", message="Memory is not as fresh as was asked for.", status=503)


def _write(awaited: AwaitedWrite) -> Write:
    place = Position(awaited.place.topic, awaited.place.partition, awaited.place.offset) if awaited.place else None
    return Write(bytes.fromhex(awaited.identity), bytes.fromhex(awaited.body), place)


def _ends(ends: Mapping[Partition, int]) -> tuple[LogEnd, ...]:
    """Nothing is below offset 0."""
    return tuple(LogEnd(topic=topic, partition=partition, next_offset=end) for (topic, partition), end in sorted(ends.items()) if end)


def _seconds(age: float | None) -> timedelta | None:
    return None if age is None else timedelta(seconds=age)


def _clock() -> float:
    return asyncio.get_running_loop().time()


def _until(event: Received[EventData], wanted: ReadConsistency) -> float:
    """On the loop's clock: the reader's own limit, within the request's deadline."""
    left = event.deadline.timestamp() - time.time() - _MARGIN_SECONDS if event.deadline else wanted.wait_seconds
    return _clock() + min(wanted.wait_seconds, left)
