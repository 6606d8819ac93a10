"""Postgres goes away under a running service and comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tessera.contracts.events import PolicyReported, PolicySubmitted, RetentionPolicy
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
    settings = world.database.settings("retention")
    link = Link(settings.host, settings.port)
    await link.mend()
    yield link
    await link.cut()


def status(service: ServiceProcess) -> int:
    return service.get_admin("/health/ready")[0]


async def test_without_postgres_it_is_not_ready_and_answers_what_waited_once_it_is_back(
    service_process: ServiceFactory, world: Any, wire: Any, link: Link
) -> None:
    environment = {"TESSERA_RETENTION__POSTGRES__HOST": "127.0.0.1", "TESSERA_RETENTION__POSTGRES__PORT": str(link.listening_port)}
    service = await asyncio.to_thread(
        service_process, "retention", database=world.database, kafka_prefix=world.kafka_prefix, environment=environment
    )
    assert (await wire.submit(max_age_days=30)).version == 1
    await link.cut()
    identity = await wire.send("policy.requested", PolicySubmitted(reply_partition=3, policy=RetentionPolicy(max_age_days=7)))

    async def not_ready() -> bool:
        return await asyncio.to_thread(status, service) == 503

    await eventually(not_ready)
    await link.mend()
    events = await wire.replies.until(lambda seen: any(e.attributes.get("correlationid") == identity for e in seen))
    told = PolicyReported.model_validate(next(e for e in events if e.attributes.get("correlationid") == identity).data)
    assert told.version == 2

    async def ready() -> bool:
        return await asyncio.to_thread(status, service) == 200

    await eventually(ready)
