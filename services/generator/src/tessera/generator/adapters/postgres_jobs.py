"""Job rows in Postgres.

A row is leased by moving it to `running` with a new `attempt`, which every later write of the worker must match. Finished rows lose their
content at once and stay for a while as the memory of what was done, so that a late duplicate or cancellation finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol

from pydantic import ValidationError
from sqlalchemy import text

from tessera.bus import Origin, Transaction
from tessera.contracts import GenerationCompleted, GenerationEnded, GenerationFailed, GenerationReady
from tessera.generator.domain.endings import CANCELLED, INTERNAL, LeaseLostError, failed
from tessera.generator.domain.transcript import Progress
from tessera.generator.ports import Admission, EndedJob, Job, LeaseState, NewJob, TenantShares
from tessera.storage import Database, DirectStatement, driver_of
from tessera.telemetry import get_logger

_log = get_logger(__name__)
Row = Mapping[str, Any]
CHANNEL: Final = "tessera_generator_jobs"
MAXIMUM_LAPSES: Final = 3
"""A job whose worker died this often is not tried again: it may be what kills them."""

_ADD = DirectStatement(
    "WITH added AS (INSERT INTO generation_job (tenant_id, generation_id, subject_id, provider, state, ready, origin, deadline) "
    "VALUES (:tenant_id, :generation_id, :subject_id, :provider, 'ready', :ready, :origin, :deadline) "
    "ON CONFLICT (tenant_id, generation_id) DO NOTHING RETURNING provider) "
    "SELECT pg_notify(:channel, 'ready ' || provider) FROM added"
)
_STATE_OF = text("SELECT state FROM generation_job WHERE tenant_id = :tenant_id AND generation_id = :generation_id")
_CANCEL = text(
    "INSERT INTO generation_job AS job (tenant_id, generation_id, state, cancel_reason, finished_at) "
    "VALUES (:tenant_id, :generation_id, 'cancelled', :reason, now()) "
    "ON CONFLICT (tenant_id, generation_id) DO UPDATE SET cancel_reason = excluded.cancel_reason WHERE job.finished_at IS NULL"
)
_NOTIFY = text("SELECT pg_notify(:channel, :payload)")

_DUE = (
    "job.provider = :provider AND job.cancel_reason IS NULL AND job.deadline > now() AND ((job.state = 'ready' AND job.run_after <= now()) "
    "OR (job.state = 'running' AND job.lease_expires_at < now() AND job.lapses + 1 < :maximum_lapses))"
)
_CLAIM = DirectStatement(
    "WITH busy AS (SELECT tenant_id, count(*) AS jobs FROM generation_job "  # noqa: S608 - constants
    "WHERE state = 'running' AND lease_expires_at >= now() AND provider = :provider GROUP BY tenant_id), "
    "ranked AS (SELECT tenant_id, generation_id, row_number() OVER (PARTITION BY tenant_id ORDER BY created_at) AS place "
    f"FROM generation_job AS job WHERE {_DUE}), "
    # One look into the index for each tenant that waits: grouped, every job of the last day would be read at each claim.
    "served AS (SELECT waiting.tenant_id, (SELECT max(claimed_at) FROM generation_job AS earlier "
    "WHERE earlier.provider = :provider AND earlier.tenant_id = waiting.tenant_id) AS at "
    "FROM (SELECT DISTINCT tenant_id FROM ranked) AS waiting), "
    "due AS (SELECT job.tenant_id, job.generation_id FROM generation_job AS job JOIN ranked USING (tenant_id, generation_id) "
    f"JOIN served USING (tenant_id) LEFT JOIN busy USING (tenant_id) WHERE {_DUE} "
    "AND ranked.place + coalesce(CAST(CAST(:running AS jsonb) ->> job.tenant_id AS integer), 0) <= :tenant_limit "
    "ORDER BY coalesce(busy.jobs, 0) + ranked.place, served.at NULLS FIRST, job.created_at LIMIT :limit FOR UPDATE OF job SKIP LOCKED) "
    "UPDATE generation_job AS job SET state = 'running', attempt = job.attempt + 1, claimed_at = clock_timestamp(), "
    "lapses = job.lapses + CAST(job.state = 'running' AS integer), lease_expires_at = now() + CAST(:lease AS interval) "
    "FROM due WHERE job.tenant_id = due.tenant_id AND job.generation_id = due.generation_id "
    "RETURNING job.tenant_id, job.generation_id, job.ready, job.origin, job.deadline, job.attempt, job.last_index, job.last_offset, "
    "job.sent_text, job.cancel_reason, job.deadline <= now() AS expired"
)
_CLAIM_ENDED = DirectStatement(
    "WITH due AS (SELECT tenant_id, generation_id FROM generation_job "
    "WHERE (state = 'ready' OR (state = 'running' AND lease_expires_at < now())) "
    "AND (cancel_reason IS NOT NULL OR deadline <= now() OR (state = 'running' AND lapses + 1 >= :maximum_lapses)) "
    "LIMIT :limit FOR UPDATE SKIP LOCKED) "
    "UPDATE generation_job AS job SET state = 'running', attempt = job.attempt + 1, "
    "lapses = job.lapses + CAST(job.state = 'running' AS integer), lease_expires_at = now() + CAST(:lease AS interval) "
    "FROM due WHERE job.tenant_id = due.tenant_id AND job.generation_id = due.generation_id "
    "RETURNING job.tenant_id, job.generation_id, job.ready, job.origin, job.deadline, job.attempt, job.last_index, job.last_offset, "
    "job.sent_text, job.cancel_reason, job.deadline <= now() AS expired"
)
_RENEW = DirectStatement(
    "UPDATE generation_job SET lease_expires_at = now() + CAST(:lease AS interval) "
    "WHERE tenant_id = :tenant_id AND generation_id = :generation_id AND attempt = :attempt AND state = 'running' RETURNING cancel_reason"
)
_RECORD = DirectStatement(
    "UPDATE generation_job SET last_index = :last_index, last_offset = :last_offset, sent_text = :sent_text "
    "WHERE tenant_id = :tenant_id AND generation_id = :generation_id AND attempt = :attempt AND state = 'running' RETURNING true"
)
_POSTPONE = text(
    "UPDATE generation_job SET state = 'ready', lease_expires_at = NULL, run_after = now() + CAST(:delay AS interval) "
    "WHERE tenant_id = :tenant_id AND generation_id = :generation_id AND attempt = :attempt AND state = 'running' RETURNING provider"
)
_FINISH = DirectStatement(
    "UPDATE generation_job SET state = :state, lease_expires_at = NULL, finished_at = now(), ready = NULL, sent_text = '' "
    "WHERE tenant_id = :tenant_id AND generation_id = :generation_id AND attempt = :attempt AND state = 'running' RETURNING true"
)
_PURGE = text("DELETE FROM generation_job WHERE finished_at < now() - CAST(:age AS interval)")


class _BusTransactions(Protocol):
    """The part of the bus that ends jobs."""

    def transaction(self, origin: Origin) -> AbstractAsyncContextManager[Transaction]:
        """One transaction on behalf of `origin`."""


class PostgresIntake:
    """Job rows in the transaction of the event being handled."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection

    async def add(self, job: NewJob) -> Admission:
        """Inserts the row and notifies workers at the commit."""
        identity = {"tenant_id": job.origin.tenant_id, "generation_id": job.ready.request.generation_id}
        values = {
            **identity,
            "subject_id": job.origin.subject_id,
            "provider": job.provider,
            "ready": job.ready.model_dump_json(),
            "origin": json.dumps(asdict(job.origin)),
            "deadline": job.deadline,
            "channel": CHANNEL,
        }
        if await _ADD.rows(driver_of(self._connection), values):
            return "added"
        return "cancelled_before" if await self._connection.scalar(_STATE_OF, identity) == "cancelled" else "known"

    async def cancel(self, tenant_id: str, generation_id: str, reason: str) -> None:
        """Marks the row, or leaves a cancelled one, and notifies workers at the commit."""
        await self._connection.execute(_CANCEL, {"tenant_id": tenant_id, "generation_id": generation_id, "reason": reason})
        await self._notify(f"cancelled {json.dumps([tenant_id, generation_id])}")

    async def fail(self, ready: GenerationReady, failure: GenerationFailed) -> None:
        """Through the outbox."""
        await _tell(self._transaction, ready, failure, "generation.refused")

    async def _notify(self, payload: str) -> None:
        await self._connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": payload})


class PostgresJobStore:
    """Job rows for workers."""

    def __init__(self, database: Database, bus: _BusTransactions) -> None:
        self._database = database
        self._bus = bus

    async def claim(self, provider: str, limit: int, lease: timedelta, shares: TenantShares | None = None) -> Sequence[Job]:
        """FOR UPDATE SKIP LOCKED: two workers never take the same row."""
        values: dict[str, Any] = {"provider": provider, "limit": limit, "lease": lease, "maximum_lapses": MAXIMUM_LAPSES}
        values["tenant_limit"] = limit if shares is None else shares.limit
        values["running"] = json.dumps({} if shares is None else dict(shares.running))
        return [_job(row) for row in await self._leased(_CLAIM, values)]

    async def claim_ended(self, limit: int, lease: timedelta) -> Sequence[EndedJob]:
        """As `claim`, for rows of any provider that will not run any more."""
        values = {"limit": limit, "lease": lease, "maximum_lapses": MAXIMUM_LAPSES}
        return [EndedJob(_job(row), _reason(row)) for row in await self._leased(_CLAIM_ENDED, values)]

    async def renew(self, job: Job, lease: timedelta) -> LeaseState:
        """One update that also tells about a cancellation."""
        async with self._database.driver() as driver:
            rows = await _RENEW.rows(driver, {**_mine(job), "lease": lease})
        if not rows:
            return "lost"
        return "cancelled" if rows[0]["cancel_reason"] is not None else "held"

    async def record(self, job: Job, progress: Progress) -> None:
        """Raises LeaseLostError when the row has moved on."""
        values = {"last_index": progress.last_index, "last_offset": progress.last_offset, "sent_text": progress.text}
        async with self._database.driver() as driver:
            changed = await _RECORD.rows(driver, {**_mine(job), **values})
        _require_held(job, changed)

    async def postpone(self, job: Job, delay: timedelta) -> None:
        """The row is due again after `delay`; at once, if some other worker may take it, that one is woken."""
        async with self._database.transaction() as connection:
            row = (await connection.execute(_POSTPONE, {**_mine(job), "delay": delay})).first()
            if row is not None and not delay:
                await connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": f"ready {row.provider}"})

    async def finish(self, job: Job, event: GenerationCompleted | GenerationFailed) -> None:
        """The row's end and the outbox row commit together."""
        async with self._bus.transaction(job.origin) as transaction:
            changed = await _FINISH.rows(driver_of(transaction.connection), {**_mine(job), "state": _end_state(event)})
            _require_held(job, changed)
            await _tell(transaction, job.ready, event, "generation.ended")

    async def purge(self, finished_before: timedelta) -> int:
        """One delete."""
        async with self._database.transaction() as connection:
            return (await connection.execute(_PURGE, {"age": finished_before})).rowcount

    async def _leased(self, statement: DirectStatement, values: dict[str, Any]) -> list[Row]:
        """The leased rows; one that a former version wrote and this one cannot read is ended, so that it stops nobody else."""
        async with self._database.driver() as driver:
            rows = await statement.rows(driver, values)
        readable = [row for row in rows if _is_readable(row)]
        for row in rows:
            if row not in readable:
                await self._discard(row)
        return readable

    async def _discard(self, row: Row) -> None:
        identity = {name: row[name] for name in ("tenant_id", "generation_id", "attempt")}
        _log.error("generation_job_unreadable", generation_id=row["generation_id"])
        async with self._bus.transaction(Origin(**json.loads(row["origin"]))) as transaction:
            await _FINISH.rows(driver_of(transaction.connection), {**identity, "state": "failed"})
            await transaction.reply(failed(row["generation_id"], row["attempt"], Progress(), INTERNAL), step="generation.ended")


async def _tell(transaction: Transaction, ready: GenerationReady, ending: GenerationCompleted | GenerationFailed, step: str) -> None:
    """The end, to whoever reads the stream, and to the accounts."""
    await transaction.reply(ending, step=step)
    ended = GenerationEnded.of(ready.request, ending, datetime.now(UTC))
    await transaction.publish(ended, step="generation.accounted", key=ended.generation_id.encode())


def _is_readable(row: Row) -> bool:
    try:
        _job(row)
    except ValidationError:
        return False
    return True


def _mine(job: Job) -> dict[str, Any]:
    return {"tenant_id": job.tenant_id, "generation_id": job.generation_id, "attempt": job.attempt}


def _require_held(job: Job, changed: Sequence[Row]) -> None:
    if not changed:
        raise LeaseLostError(f"the lease of generation {job.generation_id} is lost")


def _end_state(event: GenerationCompleted | GenerationFailed) -> str:
    if isinstance(event, GenerationCompleted):
        return "completed"
    return "cancelled" if event.problem.code == CANCELLED.code else "failed"


def _job(row: Row) -> Job:
    return Job(
        tenant_id=row["tenant_id"],
        generation_id=row["generation_id"],
        ready=GenerationReady.model_validate_json(row["ready"], extra="ignore"),
        origin=Origin(**json.loads(row["origin"])),
        deadline=row["deadline"],
        attempt=row["attempt"],
        progress=Progress(row["last_index"], row["last_offset"], row["sent_text"]),
    )


def _reason(row: Row) -> Literal["cancelled", "expired", "abandoned"]:
    if row["cancel_reason"] is not None:
        return "cancelled"
    return "expired" if row["expired"] else "abandoned"
