"""Builds retention; the only place that does."""

from __future__ import annotations

from datetime import timedelta

from tessera.bus.service import Runtime, run_service
from tessera.contracts.errors import FatalError
from tessera.retention import consumers
from tessera.retention.adapters.audit import PostgresAuditTrail
from tessera.retention.adapters.jobs import PostgresSweepJobs
from tessera.retention.adapters.postgres import PostgresUnit
from tessera.retention.settings import RetentionSettings
from tessera.retention.workers import SweepPacing, SweepWorker


async def build(runtime: Runtime[RetentionSettings]) -> None:
    """Registers the consumers and the sweep worker."""
    if runtime.database is None:
        raise FatalError("retention needs Postgres")
    settings = runtime.settings.sweeps
    pacing = SweepPacing(
        poll=timedelta(seconds=settings.poll_seconds),
        confirmation=timedelta(seconds=settings.confirmation_seconds),
        attempts=settings.attempts,
    )
    worker = SweepWorker(PostgresSweepJobs(runtime.database, runtime.bus, settings.lease), pacing)
    runtime.add_worker("sweeps", worker.run)
    consumers.register(runtime.bus, PostgresUnit, PostgresAuditTrail(runtime.database))


def main() -> None:
    """Runs the service until it is told to stop."""
    run_service(RetentionSettings, build)


if __name__ == "__main__":
    main()
