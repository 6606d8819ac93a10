"""Postgres or the object store goes away under a running service and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tessera.contracts.events import ValidationCancelled, ValidationReported
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack
from tessera.testkit.waiting import eventually
from tessera.testkit.wire import Wire

pytestmark = pytest.mark.integration

REPLY_PARTITION = 6


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    """One that no other module's outage, or service, reaches."""
    return make_world()


@pytest.fixture(scope="module")
def link(world: Any) -> Iterator[Wire]:
    """The way to Postgres."""
    link = Wire(world.database.settings("validator").port)
    yield link
    link.cut()


async def becomes(service: ServiceProcess, dependency: str, status: int, word: str, breaker: str) -> None:
    """Waits until readiness says this, and this of the dependency's breaker."""
    await eventually(lambda: service.readiness(dependency) == (status, word, breaker))


@pytest.fixture(scope="module")
def service(stack: Stack, world: Any, link: Wire) -> Iterator[ServiceProcess]:
    """One, which every outage leaves running."""
    address = {"TESSERA_VALIDATOR__POSTGRES__HOST": "127.0.0.1", "TESSERA_VALIDATOR__POSTGRES__PORT": str(link.port)}
    with ServiceProcess("validator", stack, world.database, world.kafka_prefix, {**world.environment, **address}).running() as process:
        yield process


async def test_without_postgres_it_is_not_ready_and_goes_on_once_it_is_back(
    service: ServiceProcess, wire: Any, wine: Any, link: Wire
) -> None:
    candidate = await wire.store(wine[0])
    link.cut()
    await wire.send(wire.request("v", candidate, None), "v")
    await becomes(service, "postgres", 503, "unavailable", "open")
    link.mend()
    await wire.completed.until(lambda seen: any(event.data["validation_id"] == "v" for event in seen))
    assert (await wire.ended("v")).report.verdict == "review"
    await becomes(service, "postgres", 200, "ready", "closed")


async def test_without_the_object_store_it_stays_ready_and_validations_wait(
    service: ServiceProcess, world: Any, wire: Any, wine: Any
) -> None:
    candidate = await wire.store(wine[0])
    away = world.objects.with_name("away")
    world.objects.rename(away)
    world.objects.write_text("a file where a folder was")
    before = await _put_off(service)
    validation_id = await wire.submit(candidate, None)

    async def interrupted() -> bool:
        return await _put_off(service) > before

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


async def _put_off(service: ServiceProcess) -> int:
    """How often it has said that a validation will be tried again."""
    records = await asyncio.to_thread(service.log_records)
    return sum("will be tried again" in str(record.get("event")) for record in records)
