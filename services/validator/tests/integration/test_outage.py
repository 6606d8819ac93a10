"""Postgres or the object store goes away under a running service and comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tessera.testkit.plugin import ServiceFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def world(make_world: Any) -> Any:
    """One for each test: the outage is not shared."""
    return make_world()


@dataclass
class Link:
    """A TCP link to Postgres that can be cut: open connections end, new ones are refused."""

    host: str
    port: int
    server: asyncio.Server | None = None
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    listening_port: int = 0

    async def mend(self) -> None:
        self.server = await asyncio.start_server(self._carry, "127.0.0.1", self.listening_port)
        self.listening_port = self.server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self.server is not None
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(self.host, self.port)
        self.writers += [writer, other_writer]
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def link(world: Any) -> AsyncIterator[Link]:
    settings = world.database.settings("validator")
    link = Link(settings.host, settings.port)
    await link.mend()
    yield link
    await link.cut()


def status(service: ServiceProcess) -> int:
    return service.get_admin("/health/ready")[0]


async def start(service_process: ServiceFactory, world: Any, link: Link) -> ServiceProcess:
    address = {"TESSERA_VALIDATOR__POSTGRES__HOST": "127.0.0.1", "TESSERA_VALIDATOR__POSTGRES__PORT": str(link.listening_port)}
    return await asyncio.to_thread(
        service_process,
        "validator",
        database=world.database,
        kafka_prefix=world.kafka_prefix,
        environment={**world.environment, **address},
    )


async def test_without_postgres_it_is_not_ready_and_goes_on_once_it_is_back(
    service_process: ServiceFactory, world: Any, wire: Any, wine: Any, link: Link
) -> None:
    service = await start(service_process, world, link)
    candidate = await wire.store(wine[0])
    await link.cut()
    await wire.send(wire.request("v", candidate, None), "v")

    async def not_ready() -> bool:
        return await asyncio.to_thread(status, service) == 503

    await eventually(not_ready)
    await link.mend()
    await wire.completed.of_type("tessera.validation.completed.v1")
    assert (await wire.ended("v")).report.verdict == "review"


async def test_without_the_object_store_it_stays_ready_and_validations_wait(
    service_process: ServiceFactory, world: Any, wire: Any, wine: Any, link: Link
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
    assert (await wire.inspect(validation_id)).finished_at is None
    assert await asyncio.to_thread(status, service) == 200
    world.objects.unlink()
    away.rename(world.objects)
    assert (await wire.ended(validation_id)).state == "completed"
