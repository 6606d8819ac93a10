"""What became of generations: written down as their events tell it, looked for in the log where none does, added up by day."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from tessera.bus import Received
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import (
    GENERATION_CANCELLED,
    GenerationCompleted,
    GenerationEnded,
    GenerationFailed,
    GenerationRequested,
    Usage,
)
from tessera.gateway.domain.assembly import Ending
from tessera.gateway.domain.errors import ApiError, not_found
from tessera.gateway.domain.records import Ended, GenerationRecord, Outcome, Prices, Since
from tessera.gateway.handlers.generations import assembled
from tessera.gateway.ports import GenerationRecords, Log, RecordsBeingWritten
from tessera.resilience import CircuitOpenError
from tessera.telemetry import get_logger

_GRACE: Final = timedelta(seconds=10)
_AGAIN: Final = timedelta(seconds=60)
_READING: Final = timedelta(seconds=10)
_AT_ONCE: Final = 20
_COUNTED_AT_ONCE: Final = 5_000
_ARRIVING: Final = timedelta(milliseconds=500)
_SKEW: Final = timedelta(seconds=5)
_LOOK_EVERY: Final = timedelta(milliseconds=50)
_HOPELESS: Final = timedelta(days=1)
"""As long as the log keeps replies."""
_LOST: Final = Problem(code="generation_lost", message="The log holds no end of this generation.", status=500)

ClaimedAt = Callable[[], Awaitable[datetime | None]]

_log = get_logger(__name__)


async def generations_requested(events: Sequence[Received[GenerationRequested]], records: RecordsBeingWritten) -> None:
    """Accepted, whoever runs them."""
    await records.accept([_requested(event) for event in events], _GRACE)


async def generations_ended(events: Sequence[Received[GenerationEnded]], records: RecordsBeingWritten, prices: Prices) -> None:
    """Over, with what they used and cost."""
    await records.end([_told(event, prices) for event in events])


async def found(records: GenerationRecords, log: Log, tenant_id: str, generation_id: str, claimed_at: ClaimedAt) -> GenerationRecord:
    """The record; else, after a moment, the request itself from the log: a replica that died holds up what it was to write down.

    `claimed_at` tells when the row of its Idempotency-Key was written, where it has one. Raises ApiError 404 where there is neither.
    """
    until = asyncio.get_running_loop().time() + _ARRIVING.total_seconds()
    while (record := await records.find(tenant_id, generation_id)) is None:
        if asyncio.get_running_loop().time() < until:
            await asyncio.sleep(_LOOK_EVERY.total_seconds())
            continue
        at = _begun_at(generation_id) or await claimed_at()
        event = None if at is None else await log.requested(tenant_id, generation_id, at)
        if event is None:
            raise not_found("generation_not_found", f"The generation '{generation_id}'")
        return _requested(event)
    return record


def _begun_at(generation_id: str) -> datetime | None:
    """When an id of our own was made, by its own time; None for what can be none, or is older than what the log keeps."""
    try:
        name = UUID(generation_id)
    except ValueError:
        return None
    at = datetime.fromtimestamp((name.int >> 80) / 1_000, UTC) if name.version == 7 else None
    return at if at is not None and timedelta(0) <= datetime.now(UTC) - at + _SKEW <= _HOPELESS else None


async def is_known(records: GenerationRecords, log: Log, tenant_id: str, generation_id: str, at: datetime) -> bool:
    """Whether its event, written at `at` or later, has been heard of or is in the log; False also where that cannot be found out."""
    try:
        if await records.find(tenant_id, generation_id) is not None:
            return True
        return await log.requested(tenant_id, generation_id, at) is not None
    except (RetryableError, CircuitOpenError, ApiError):
        return False


@dataclass(frozen=True)
class Bookkeeper:
    """Ends records whose end no event told, adds up what ended, deletes what is old."""

    records: GenerationRecords
    log: Log
    prices: Prices
    keep_for: timedelta
    reading: timedelta = _READING

    async def once(self) -> None:
        """One round. Raises RetryableError where Postgres is away."""
        # Side by side: one whose end is not there takes as long as looking may.
        await asyncio.gather(*(self._end(record) for record in await self.records.overdue(_AT_ONCE, _AGAIN)))
        while await self.records.count(_COUNTED_AT_ONCE) == _COUNTED_AT_ONCE:
            continue
        await self.records.expire(self.keep_for, _COUNTED_AT_ONCE)

    async def _end(self, record: GenerationRecord) -> None:
        ending = await self._ending(record)
        if ending is None:
            return
        await self.records.end(record, _read(record, ending, self.prices))
        _log.info("generation_ended_from_the_log", generation_id=record.id)

    async def _ending(self, record: GenerationRecord) -> Ending | None:
        """From the log; lost where that no longer holds it, or has had none for a day. None where it may still come."""
        lost = GenerationFailed(generation_id=record.id, problem=_LOST)
        if record.since is None:
            return lost
        try:
            async with asyncio.timeout(self.reading.total_seconds()):
                return await _last(self.log, record.id, record.since)
        except ApiError as error:
            if error.status == 410:
                return lost
            _log.warning("generation_not_ended_yet", generation_id=record.id, error=error.message)
        except TimeoutError:
            if datetime.now(UTC) - record.accepted_at > _HOPELESS:
                return lost
        return None


async def _last(log: Log, generation_id: str, since: Since) -> Ending | None:
    async with log.stream(generation_id, since=since) as replies:
        async for reply in assembled(replies):
            if isinstance(reply.data, GenerationCompleted | GenerationFailed):
                return reply.data
    return None


def _requested(event: Received[GenerationRequested]) -> GenerationRecord:
    request, shown = event.data, event.data.stream_options
    record = _record(event.tenant_id, request, request.accepted_at or event.time)
    return replace(
        record,
        deadline=event.deadline,
        streamed=request.stream,
        include_usage=bool(shown and shown.include_usage),
        include_obfuscation=bool(shown and shown.include_obfuscation),
        since=None if request.reply_offset is None else Since(request.reply_partition, request.reply_offset),
    )


def _record(tenant_id: str, told: GenerationRequested | GenerationEnded, accepted_at: datetime) -> GenerationRecord:
    """What both events tell."""
    model, caller = told.model, told.caller
    return GenerationRecord(
        tenant_id=tenant_id,
        id=told.generation_id,
        model_id=model.model_id,
        asked_model=told.asked_model or model.model_id,
        provider=model.provider,
        capability=model.capability,
        accepted_at=accepted_at,
        credential_id=caller.credential_id if caller else None,
        user=caller.user if caller else None,
    )


def _told(event: Received[GenerationEnded], prices: Prices) -> tuple[GenerationRecord, Ended]:
    data = event.data
    record = _record(event.tenant_id, data, data.accepted_at or data.ended_at)
    ended = Ended(data.outcome, data.ended_at, data.finish_reason, _json(data.problem))
    return record, _with_usage(ended, record, data.usage, prices)


def _read(record: GenerationRecord, ending: Ending, prices: Prices) -> Ended:
    """By a reply, where no event told."""
    at = record.deadline or datetime.now(UTC)
    if isinstance(ending, GenerationFailed):
        outcome: Outcome = "cancelled" if ending.problem.code == GENERATION_CANCELLED else "failed"
        ended = Ended(outcome, at, None, _json(ending.problem))
    else:
        ended = Ended("completed", at, ending.finish_reason)
    return _with_usage(ended, record, ending.usage, prices)


def _with_usage(ended: Ended, record: GenerationRecord, usage: Usage | None, prices: Prices) -> Ended:
    if usage is None:
        return ended
    return replace(
        ended,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        usage_source=usage.source,
        cost=prices.cost(record.model_id, usage),
    )


def _json(problem: Problem | None) -> str | None:
    return None if problem is None else problem.model_dump_json(exclude_none=True)
