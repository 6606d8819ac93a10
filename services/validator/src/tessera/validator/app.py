"""Builds the validator; the only place that does."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from tessera.bus.reloading import Swap
from tessera.bus.service import Runtime, run_service
from tessera.contracts.errors import FatalError
from tessera.storage import ObjectStore
from tessera.validator import consumers
from tessera.validator.adapters.datasets import DuckDbReader, ReadingLimits
from tessera.validator.adapters.postgres import PostgresUnit, PostgresValidationJobs
from tessera.validator.adapters.scratch import ScratchFolder
from tessera.validator.settings import ValidationSettings, ValidatorSettings
from tessera.validator.workers import ValidationPacing, ValidationWorker


async def build(runtime: Runtime[ValidatorSettings]) -> None:
    """Registers the consumers and the validation worker."""
    if runtime.database is None:
        raise FatalError("the validator needs Postgres")
    settings = runtime.settings.validations
    objects = ObjectStore(runtime.settings.objects)
    runtime.add_dependency("objects", required=False, check=objects.check, breaker=objects.breaker)
    jobs = PostgresValidationJobs(runtime.database, runtime.bus, settings.lease, settings.tenant_concurrency)
    scratch = await _scratch(runtime)
    reader = DuckDbReader(objects, _limits(settings), scratch.path)
    worker = ValidationWorker(jobs, reader, objects.breaker, _pacing(settings))
    runtime.add_worker("validations", worker.run)
    consumers.register(runtime.bus, PostgresUnit)

    def prepare(fresh: ValidatorSettings) -> Swap:
        validations = fresh.validations
        limits, pacing = _limits(validations), _pacing(validations)

        def swap() -> None:
            reader.limit(limits)
            jobs.share(validations.lease, validations.tenant_concurrency)
            worker.pace(pacing)

        return swap

    runtime.on_reload(prepare)


async def _scratch(runtime: Runtime[ValidatorSettings]) -> ScratchFolder:
    folder = runtime.settings.scratch_folder
    try:
        scratch = await asyncio.to_thread(ScratchFolder.take, folder)
    except OSError as error:
        raise FatalError(f"the validator cannot use its scratch folder {folder}: {error.strerror}") from error

    async def release() -> None:
        await asyncio.to_thread(scratch.release)

    runtime.on_close(release)
    return scratch


def _limits(settings: ValidationSettings) -> ReadingLimits:
    return ReadingLimits(
        memory_megabytes=settings.memory_megabytes,
        threads=settings.threads,
        bytes=settings.maximum_bytes,
        columns=settings.maximum_columns,
        sampled_rows=settings.sampled_rows,
    )


def _pacing(settings: ValidationSettings) -> ValidationPacing:
    return ValidationPacing(
        poll=timedelta(seconds=settings.poll_seconds),
        prolong_every=timedelta(seconds=settings.prolong_seconds),
        attempts=settings.attempts,
    )


def main() -> None:
    """Runs the service until it is told to stop."""
    run_service(ValidatorSettings, build)


if __name__ == "__main__":
    main()
