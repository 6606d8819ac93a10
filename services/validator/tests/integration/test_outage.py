"""Postgres or the object store goes away under a running service and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tessera.contracts.events import ValidationCancelled, ValidationReported
from tessera.testkit.plugin import ServiceFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.waiting import eventually
from tessera.testkit.wire import Wire

pytestmark = pytest.mark.integration

REPLY_PARTITION = 6


@pytest.fixture
def world(make_world: Any) -> Any:
    """One for each test: the outage is not shared."""
    return make_world()


@pytest.fixture
def link(world: Any) -> Iterator[Wire]:
    """The way to Postgres."""
    link = Wire(world.database.settings("validator").port)
    yield link
    link.cut()


async def becomes(service: ServiceProcess, dependency: str, status: int, word: str, breaker: str) -> None:
    """Waits until readiness says this, and this of the dependency's breaker."""
    await eventually(lambda: service.readiness(dependency) == (status, word, breaker))


async def start(service_process: ServiceFactory, world: Any, link: Wire) -> ServiceProcess:
    address = {"TESSERA_VALIDATOR__POSTGRES__HOST": "127.0.0.1", "TESSERA_VALIDATOR__POSTGRES__PORT": str(link.port)}
    return await asyncio.to_thread(
        service_process,
        "validator",
        database=world.database,
        kafka_prefix=world.kafka_prefix,
        environment={**world.environment, **address},
    )


async def test_without_postgres_it_is_not_ready_and_goes_on_once_it_is_back(
    service_process: ServiceFactory, world: Any, wire: Any, wine: Any, link: Wire
) -> None:
    service = await start(service_process, world, link)
    candidate = await wire.store(wine[0])
    link.cut()
    await wire.send(wire.request("v", candidate, None), "v")
    await becomes(service, "postgres", 503, "unavailable", "open")
    link.mend()
    await wire.completed.of_type("tessera.validation.completed.v1")
    assert (await wire.ended("v")).report.verdict == "review"
    await becomes(service, "postgres", 200, "ready", "closed")


async def test_without_the_object_store_it_stays_ready_and_validations_wait(
    service_process: ServiceFactory, world: Any, wire: Any, wine: Any, link: Wire
) -> None:
    service = await start(service_process, world, link)
    candidate = await wire.store(wine[0])
    away = world.objects.with_name("away")
    world.objects.rename(away)
    world.objects.write_text("a file where a folder was")
    validation_id = await wire.submit(candidate, None)

    async def interrupted() -> bool:
        records = await asyncio.to_thread(service.log_records)
        return any("will be tried again" in str(record.get("event")) for record in records)

    await eventually(interrupted)
    await becomes(service, "objects", 200, "degraded", "open")
    assert (await wire.inspect(validation_id)).finished_at is None
    unwanted = await wire.submit(candidate, None)
    cancelled = ValidationCancelled(reply_partition=REPLY_PARTITION, validation_id=unwanted)
    told = await wire.ask(cancelled, ValidationReported, unwanted)
    assert (told.state, told.problem.code) == ("failed", "validation_cancelled")
    world.objects.unlink()
    away.rename(world.objects)
    assert (await wire.ended(validation_id)).state == "completed"
    assert (await wire.inspect(unwanted)).problem == told.problem
    await becomes(service, "objects", 200, "ready", "closed")
