"""Builds retention; the only place that does."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from tessera.bus.service import Runtime, run_service
from tessera.contracts.errors import FatalError
from tessera.retention import consumers
from tessera.retention.adapters.audit import PostgresAuditTrail
from tessera.retention.adapters.jobs import PostgresSweepJobs
from tessera.retention.adapters.postgres import PostgresUnit
from tessera.retention.settings import RetentionSettings, SweepSettings
from tessera.retention.workers import SweepPacing, SweepWorker


async def build(runtime: Runtime[RetentionSettings]) -> None:
    """Registers the consumers and the sweep worker."""
    if runtime.database is None:
        raise FatalError("retention needs Postgres")
    settings = runtime.settings.sweeps
    worker = SweepWorker(PostgresSweepJobs(runtime.database, runtime.bus, settings.lease), _pacing(settings))
    runtime.add_worker("sweeps", worker.run)
    runtime.on_reload(lambda fresh: partial(worker.pace, _pacing(fresh.sweeps)))
    consumers.register(runtime.bus, PostgresUnit, PostgresAuditTrail(runtime.database))


def _pacing(settings: SweepSettings) -> SweepPacing:
    return SweepPacing(
        poll=timedelta(seconds=settings.poll_seconds),
        confirmation=timedelta(seconds=settings.confirmation_seconds),
        attempts=settings.attempts,
    )


def main() -> None:
    """Runs the service until it is told to stop."""
    run_service(RetentionSettings, build)


if __name__ == "__main__":
    main()
