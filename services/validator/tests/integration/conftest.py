"""The validator as a process on a real Kafka and Postgres; the test plays the gateway."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts.base import EventData
from tessera.contracts.events import DatasetReference, ValidationInspected, ValidationReported, ValidationRequested
from tessera.contracts.ids import aggregate_key
from tessera.local.processes import run_apart
from tessera.storage import ObjectStore, ObjectStoreSettings
from tessera.testkit.databases import PostgresDatabase
from tessera.testkit.events import CloudEventProducer, CloudEventReader, unique_kafka_prefix
from tessera.testkit.plugin import DatabaseFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack

REPLY_PARTITION = 6
E = TypeVar("E", bound=EventData)


@dataclass(frozen=True)
class World:
    """A database, the topics that belong to it, and an object store."""

    database: PostgresDatabase
    kafka_prefix: str
    objects: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"TESSERA_VALIDATOR__OBJECTS__URL": self.objects.as_uri(), "TESSERA_VALIDATOR__VALIDATIONS__LEASE_SECONDS": "20"}


@dataclass
class Wire:
    """Kafka and the object store as the gateway sees them."""

    tenant: str
    producer: CloudEventProducer
    replies: CloudEventReader
    completed: CloudEventReader
    objects: ObjectStore

    async def store(self, rows: NDArray[np.float64], *, tenant: str | None = None) -> DatasetReference:
        header = ",".join(f"c{index}" for index in range(rows.shape[1]))
        lines = [header, *(",".join(repr(float(value)) for value in row) for row in rows)]
        return await self.store_bytes("\n".join(lines).encode(), "csv", tenant=tenant)

    async def store_bytes(self, data: bytes, kind: str, *, tenant: str | None = None) -> DatasetReference:
        digest = hashlib.sha256(data).hexdigest()
        key = f"datasets/{tenant or self.tenant}/{digest}.{kind}"
        await self.objects.put(key, data)
        return DatasetReference.model_validate(
            {"dataset_id": digest[:16], "object_key": key, "format": kind, "size_bytes": len(data), "sha256": digest}
        )

    async def ask(self, data: EventData, answer: type[E], validation_id: str, *, tenant: str | None = None) -> E:
        identity = await self.send(data, validation_id, tenant=tenant)
        events = await self.replies.until(lambda seen: any(e.attributes.get("correlationid") == identity for e in seen))
        event = next(e for e in events if e.attributes.get("correlationid") == identity)
        assert event.type == answer.event_type, event.data
        assert (event.partition, event.attributes["tenantid"]) == (REPLY_PARTITION, tenant or self.tenant)
        return answer.model_validate(event.data)

    async def send(self, data: EventData, validation_id: str, *, tenant: str | None = None) -> str:
        identity, owner = str(uuid4()), tenant or self.tenant
        known = {"tenantid": owner, "requestid": f"request-{identity}", "correlationid": identity}
        key = aggregate_key(owner, "validation", validation_id)
        await self.producer.publish("validation.requested", data, id=identity, key=key, **known)
        return identity

    def request(self, validation_id: str, candidate: DatasetReference, reference: DatasetReference | None) -> ValidationRequested:
        return ValidationRequested(reply_partition=REPLY_PARTITION, validation_id=validation_id, candidate=candidate, reference=reference)

    async def submit(self, candidate: DatasetReference, reference: DatasetReference | None) -> str:
        validation_id = str(uuid4())
        told = await self.ask(self.request(validation_id, candidate, reference), ValidationReported, validation_id)
        assert told.validation_id == validation_id
        return validation_id

    async def inspect(self, validation_id: str) -> ValidationReported:
        asked = ValidationInspected(reply_partition=REPLY_PARTITION, validation_id=validation_id)
        return await self.ask(asked, ValidationReported, validation_id)

    async def ended(self, validation_id: str, *, within: timedelta = timedelta(seconds=40)) -> ValidationReported:
        """The validation once it has ended; asks again and again."""
        deadline = datetime.now(UTC) + within
        report = await self.inspect(validation_id)
        while report.finished_at is None:
            assert datetime.now(UTC) < deadline, report
            report = await self.inspect(validation_id)
        return report


WorldFactory = Callable[[], World]


@pytest.fixture(scope="module")
def make_world(stack: Stack, postgres_database: DatabaseFactory, tmp_path_factory: pytest.TempPathFactory) -> WorldFactory:
    def make() -> World:
        prefix = unique_kafka_prefix()
        settings = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=prefix, keyed_partitions=4)
        run_apart(ensure_all(settings))
        return World(postgres_database("validator"), prefix, tmp_path_factory.mktemp("objects"))

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
    with ServiceProcess("validator", stack, world.database, world.kafka_prefix, world.environment).running() as process:
        yield process


@pytest.fixture
def tenant() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def wire(stack: Stack, world: World, tenant: str) -> AsyncIterator[Wire]:
    servers, prefix = stack.kafka_bootstrap_servers, world.kafka_prefix
    replies = CloudEventReader(servers, "reply", topic_prefix=prefix)
    completed = CloudEventReader(servers, "validation.completed", topic_prefix=prefix)
    objects = ObjectStore(ObjectStoreSettings(url=world.objects.as_uri()))
    yield Wire(tenant, CloudEventProducer(servers, topic_prefix=prefix), replies, completed, objects)
    await replies.close()
    await completed.close()


@pytest.fixture(scope="session")
def wine() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two random halves of a real table."""
    from sklearn.datasets import load_wine  # noqa: PLC0415 - slow to import

    rows = load_wine().data[np.random.default_rng(0).permutation(178)]
    return rows[:89], rows[89:]
