"""Validations in Postgres: rows for requesters, leases for workers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import text

from tessera.bus import Bus, Origin, Transaction
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem
from tessera.contracts.events import DatasetReference, ValidationCompleted, ValidationReport, ValidationReported
from tessera.contracts.ids import aggregate_key
from tessera.storage import Database, LeasedRows
from tessera.validator.ports import Job, Lease, LeaseLostError

_ADD: Final = text(
    """
    INSERT INTO validations (tenant_id, validation_id, candidate, reference, state, origin, created_at)
    VALUES (:tenant_id, :validation_id, CAST(:candidate AS jsonb), CAST(:reference AS jsonb), 'queued', CAST(:origin AS jsonb), :created_at)
    ON CONFLICT DO NOTHING
    """
)
_SAME: Final = text(
    """
    SELECT candidate = CAST(:candidate AS jsonb) AND reference IS NOT DISTINCT FROM CAST(:reference AS jsonb)
    FROM validations WHERE tenant_id = :tenant_id AND validation_id = :validation_id
    """
)
_FIND: Final = text("SELECT * FROM validations WHERE tenant_id = :tenant_id AND validation_id = :validation_id")
_CANCEL: Final = text(
    """
    UPDATE validations SET state = 'failed', problem = CAST(:problem AS jsonb), finished_at = now(), fence = fence + 1
    WHERE tenant_id = :tenant_id AND validation_id = :validation_id AND state IN ('queued', 'running')
    """
)
_ROWS: Final = LeasedRows("validations", "validation_id", ("queued", "running"))
_HELD: Final = "WHERE tenant_id = :tenant_id AND validation_id = :validation_id AND fence = :fence AND state = 'running'"
_PUT_OFF: Final = text(f"UPDATE validations SET due_at = now() + :delay, attempts = attempts - :refund {_HELD}")  # noqa: S608 - a constant
_END: Final = text(
    f"""
    UPDATE validations SET state = :state, report = CAST(:report AS jsonb), problem = CAST(:problem AS jsonb), finished_at = now()
    {_HELD}
    """  # noqa: S608 - a constant
)


class PostgresUnit:
    """`ValidationUnit` on the transaction that the bus opened."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self._connection = transaction.connection

    async def add(self, job: Job, created_at: datetime) -> bool:
        """See the port."""
        named = {"tenant_id": job.tenant_id, "validation_id": job.validation_id}
        datasets = {"candidate": job.candidate.model_dump_json(), "reference": job.reference.model_dump_json() if job.reference else None}
        origin = json.dumps(asdict(job.origin))
        await self._connection.execute(_ADD, {**named, **datasets, "origin": origin, "created_at": created_at})
        return bool(await self._connection.scalar(_SAME, {**named, **datasets}))

    async def cancel(self, tenant_id: str, validation_id: str, problem: Problem) -> None:
        """See the port. The fence grows, so that a worker that does not know it yet writes nothing."""
        named = {"tenant_id": tenant_id, "validation_id": validation_id}
        await self._connection.execute(_CANCEL, {**named, "problem": problem.model_dump_json()})

    async def report(self, tenant_id: str, validation_id: str) -> ValidationReported | None:
        """See the port."""
        found = await self._connection.execute(_FIND, {"tenant_id": tenant_id, "validation_id": validation_id})
        row = found.one_or_none()
        if row is None:
            return None
        return ValidationReported(
            validation_id=validation_id,
            state=row.state,
            created_at=row.created_at,
            finished_at=row.finished_at,
            report=ValidationReport.model_validate(_decoded(row.report)) if row.report is not None else None,
            problem=Problem.model_validate(_decoded(row.problem)) if row.problem is not None else None,
        )

    async def reply(self, data: EventData) -> None:
        """See the port."""
        await self._transaction.reply(data)


class PostgresValidationJobs:
    """`ValidationJobs` on the table validations. A lease is `due_at` in the future."""

    def __init__(self, database: Database, bus: Bus, lease: timedelta, tenant_limit: int) -> None:
        self._database = database
        self._bus = bus
        self._lease = lease
        self._tenant_limit = tenant_limit

    def share(self, lease: timedelta, tenant_limit: int) -> None:
        """Goes on with another lease, and another share of each tenant."""
        self._lease = lease
        self._tenant_limit = tenant_limit

    async def claim(self) -> Lease | None:
        """See the port."""
        async with self._database.transaction() as connection:
            row = await _ROWS.claim(connection, self._lease, tenant_limit=self._tenant_limit)
        return Lease(_job(row), row.fence, row.attempts) if row else None

    async def prolong(self, lease: Lease) -> None:
        """See the port."""
        async with self._database.transaction() as connection:
            held = await _ROWS.hold(connection, lease.job.tenant_id, lease.job.validation_id, lease.fence, self._lease)
            _check(0 if held is None else 1, lease)

    async def put_off(self, lease: Lease, delay: timedelta, *, spent: bool) -> None:
        """See the port."""
        async with self._database.transaction() as connection:
            held = await connection.execute(_PUT_OFF, {**_named(lease), "delay": delay, "refund": 0 if spent else 1})
            _check(held.rowcount, lease)

    async def complete(self, lease: Lease, report: ValidationReport) -> None:
        """See the port."""
        job = lease.job
        completed = ValidationCompleted(validation_id=job.validation_id, candidate=job.candidate, reference=job.reference, report=report)
        async with self._ending(lease, "completed", report=report.model_dump_json()) as transaction:
            await transaction.publish(completed, step="completed", key=aggregate_key(job.tenant_id, "validation", job.validation_id))

    async def fail(self, lease: Lease, problem: Problem) -> None:
        """See the port."""
        async with self._ending(lease, "failed", problem=problem.model_dump_json()):
            pass

    @asynccontextmanager
    async def _ending(
        self, lease: Lease, state: str, *, report: str | None = None, problem: str | None = None
    ) -> AsyncIterator[Transaction]:
        async with self._bus.transaction(lease.job.origin) as transaction:
            values = {**_named(lease), "state": state, "report": report, "problem": problem}
            held = await transaction.connection.execute(_END, values)
            _check(held.rowcount, lease)
            yield transaction


def _named(lease: Lease) -> dict[str, object]:
    return {"tenant_id": lease.job.tenant_id, "validation_id": lease.job.validation_id, "fence": lease.fence}


def _check(rows: int, lease: Lease) -> None:
    if rows != 1:
        raise LeaseLostError(f"the lease on validation {lease.job.validation_id} was lost")


def _job(row: Any) -> Job:
    reference = _decoded(row.reference)
    return Job(
        tenant_id=row.tenant_id,
        validation_id=row.validation_id,
        candidate=DatasetReference.model_validate(_decoded(row.candidate)),
        reference=DatasetReference.model_validate(reference) if reference is not None else None,
        origin=Origin(**_decoded(row.origin)),
    )


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
