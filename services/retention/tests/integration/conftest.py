"""Retention as a process on a real Kafka and Postgres; the test plays memory and the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from sqlalchemy import text

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts.base import EventData
from tessera.contracts.events import (
    ArchiveRequested,
    MemoryChanged,
    MemoryRecorded,
    PolicyReported,
    PolicySubmitted,
    RequestFailed,
    RetentionPolicy,
    SweepInspected,
    SweepReported,
    SweepRequested,
)
from tessera.contracts.ids import aggregate_key
from tessera.local.processes import run_apart
from tessera.storage import Database
from tessera.testkit.databases import PostgresDatabase
from tessera.testkit.events import CloudEvent, CloudEventProducer, CloudEventReader, unique_kafka_prefix
from tessera.testkit.plugin import DatabaseFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack
from tessera.testkit.waiting import eventually

REPLY_PARTITION = 3
E = TypeVar("E", bound=EventData)


@dataclass
class Wire:
    """Kafka as memory and the gateway see it."""

    tenant: str
    producer: CloudEventProducer
    replies: CloudEventReader
    archive: CloudEventReader
    recorded: list[str] = field(default_factory=list)

    async def send(self, topic: str, data: EventData, *, key: bytes | None = None, id: str | None = None, tenant: str | None = None) -> str:
        identity = id or str(uuid4())
        known = {"tenantid": tenant or self.tenant, "requestid": f"request-{identity}", "correlationid": identity}
        await self.producer.publish(topic, data, id=identity, key=key, **known)
        return identity

    async def ask(self, topic: str, data: EventData, answer: type[E], *, key: bytes | None = None, tenant: str | None = None) -> E:
        identity = await self.send(topic, data, key=key, tenant=tenant)
        events = await self.replies.until(lambda seen: any(e.attributes.get("correlationid") == identity for e in seen))
        event = next(e for e in events if e.attributes.get("correlationid") == identity)
        assert event.type == answer.event_type, event.data
        assert event.partition == REPLY_PARTITION
        assert event.attributes["tenantid"] == (tenant or self.tenant)
        return answer.model_validate(event.data)

    async def submit(self, **policy: Any) -> PolicyReported:
        submitted = PolicySubmitted(reply_partition=REPLY_PARTITION, policy=RetentionPolicy(**policy))
        return await self.ask("policy.requested", submitted, PolicyReported, key=aggregate_key(self.tenant, "policy", ""))

    async def record(self, *, age: timedelta, importance: float = 0.9, kind: str = "message", version: int = 1) -> str:
        now = datetime.now(UTC)
        memory = MemoryRecorded.model_validate(
            {
                "memory_id": str(uuid4()),
                "kind": kind,
                "version": version,
                "origin_id": "o",
                "occurred_at": now - age,
                "recorded_at": now,
                "importance": importance,
                "text": "nobody but memory keeps this",
            }
        )
        await self.send("memory.recorded", memory, key=memory.memory_id.encode())
        self.recorded.append(memory.memory_id)
        return memory.memory_id

    async def change(self, memory_id: str, change: str, version: int, sweep_id: str | None = None) -> None:
        data = MemoryChanged.model_validate(
            {"memory_id": memory_id, "version": version, "change": change, "sweep_id": sweep_id, "changed_at": datetime.now(UTC)}
        )
        await self.send("memory.changed", data, key=memory_id.encode())

    async def sweep(self, sweep_id: str, *, dry_run: bool, plan_id: str | None = None) -> SweepReported:
        asked = SweepRequested(reply_partition=REPLY_PARTITION, sweep_id=sweep_id, dry_run=dry_run, plan_id=plan_id)
        return await self.ask("sweep.requested", asked, SweepReported, key=self.sweep_key(sweep_id))

    async def refused_sweep(self, sweep_id: str, *, dry_run: bool) -> RequestFailed:
        asked = SweepRequested(reply_partition=REPLY_PARTITION, sweep_id=sweep_id, dry_run=dry_run)
        return await self.ask("sweep.requested", asked, RequestFailed, key=self.sweep_key(sweep_id))

    async def inspect(self, sweep_id: str, *, limit: int = 500, after: str | None = None) -> SweepReported:
        asked = SweepInspected(reply_partition=REPLY_PARTITION, sweep_id=sweep_id, limit=limit, after=after)
        return await self.ask("sweep.requested", asked, SweepReported, key=self.sweep_key(sweep_id))

    async def ended(self, sweep_id: str, *, within: timedelta = timedelta(seconds=20)) -> SweepReported:
        """The sweep once it has ended; asks again and again."""
        deadline = datetime.now(UTC) + within
        report = await self.inspect(sweep_id)
        while report.finished_at is None:
            assert datetime.now(UTC) < deadline, report
            report = await self.inspect(sweep_id)
        return report

    async def asked(self, sweep_id: str, items: int) -> list[CloudEvent]:
        """The archive requests of a sweep, once they name this many memories."""

        def mine(seen: Sequence[CloudEvent]) -> list[CloudEvent]:
            return [event for event in seen if event.data["sweep_id"] == sweep_id]

        seen = await self.archive.until(lambda events: sum(len(event.data["items"]) for event in mine(events)) >= items)
        return mine(seen)

    async def obey(self, sweep_id: str, items: int) -> dict[str, int]:
        """Archives what the sweep asks for, as memory would. Returns memory id → version that was named."""
        found: dict[str, int] = {}
        for event in await self.asked(sweep_id, items):
            for item in ArchiveRequested.model_validate(event.data).items:
                found[item.memory_id] = item.version
                await self.change(item.memory_id, "archived", item.version + 1, sweep_id)
        return found

    def sweep_key(self, sweep_id: str) -> bytes:
        return aggregate_key(self.tenant, "sweep", sweep_id)


@dataclass(frozen=True)
class World:
    """A database and the topics that belong to it: positions in the one refer to the other."""

    database: PostgresDatabase
    kafka_prefix: str


WorldFactory = Callable[[], World]


@pytest.fixture(scope="module")
def make_world(stack: Stack, postgres_database: DatabaseFactory) -> WorldFactory:
    def make() -> World:
        prefix = unique_kafka_prefix()
        settings = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=prefix, keyed_partitions=4)
        run_apart(ensure_all(settings))
        return World(postgres_database("retention"), prefix)

    return make


@pytest.fixture(scope="module")
def world(make_world: WorldFactory) -> World:
    return make_world()


@pytest.fixture(scope="module")
def service(stack: Stack, world: World) -> Iterator[ServiceProcess]:
    with running(stack, world) as process:
        yield process


@contextmanager
def running(stack: Stack, world: World) -> Iterator[ServiceProcess]:
    with ServiceProcess("retention", stack, world.database, world.kafka_prefix, {}).running() as process:
        yield process


@pytest.fixture
async def database(world: World) -> AsyncIterator[Database]:
    opened = Database("retention", world.database.settings("retention"))
    yield opened
    await opened.close()


@pytest.fixture
def tenant() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def wire(stack: Stack, world: World, tenant: str) -> AsyncIterator[Wire]:
    servers, prefix = stack.kafka_bootstrap_servers, world.kafka_prefix
    replies = CloudEventReader(servers, "reply", topic_prefix=prefix)
    archive = CloudEventReader(servers, "archive.requested", topic_prefix=prefix)
    yield Wire(tenant, CloudEventProducer(servers, topic_prefix=prefix), replies, archive)
    await replies.close()
    await archive.close()


async def projected(database: Database, tenant: str, *, archived: bool | None = None) -> dict[str, Any]:
    """What the service knows of the tenant's memories."""
    async with database.transaction() as connection:
        rows = await connection.execute(text("SELECT * FROM memories WHERE tenant_id = :tenant"), {"tenant": tenant})
        return {row.memory_id: row for row in rows if archived is None or row.archived is archived}


Known = Callable[[int], Awaitable[dict[str, Any]]]


@pytest.fixture
def known(database: Database, tenant: str) -> Known:
    """Waits until the service knows this many of the tenant's memories."""

    async def wait(count: int) -> dict[str, Any]:
        async def all_there() -> dict[str, Any]:
            found = await projected(database, tenant)
            assert len(found) >= count
            return found

        return await eventually(all_there)

    return wait


@pytest.fixture
def archived(database: Database, tenant: str) -> Callable[[], Awaitable[set[str]]]:
    """The tenant's memories that the service knows as archived."""

    async def read() -> set[str]:
        return set(await projected(database, tenant, archived=True))

    return read
