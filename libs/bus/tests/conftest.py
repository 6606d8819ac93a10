"""A database with delivery tables and one table of effects, and topics under a prefix of their own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from pydantic import SecretStr
from sqlalchemy import text

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import TopicDirectory, Wanted, wanted_topics
from tessera.contracts.catalogue import RETRY_TOPICS, TOPICS, consumed_by, produced_by
from tessera.storage import Database, PostgresSettings
from tessera.storage.bootstrap import bootstrap
from tessera.storage.connections import owner_engine
from tessera.storage.migrations import add_parked_events, create_delivery_tables
from tessera.testkit import Stack, unique_kafka_prefix

SERVICE = "memory"
"""The catalogue says what it reads: ingestion and archiving transactionally, recall and others as requests."""

_EFFECTS = (
    "CREATE TABLE effect (position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id text, event_id text, content text)",
    "GRANT SELECT, INSERT ON effect TO tessera_{service}_worker",
)


@dataclass(frozen=True)
class Ground:
    """Where one test's bus lives."""

    postgres: PostgresSettings
    kafka: KafkaSettings
    admin_url: str

    async def rows(self, query: str, *arguments: object) -> list[Any]:
        """Rows as the administrator sees them."""
        connection = await asyncpg.connect(self.admin_url)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    def environment(self) -> dict[str, str]:
        """The same for a process of its own."""
        return {
            "TESSERA__PROFILE": "test",
            "TESSERA__KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "TESSERA__KAFKA__TOPIC_PREFIX": self.kafka.topic_prefix,
            "TESSERA__POSTGRES__HOST": self.postgres.host,
            "TESSERA__POSTGRES__PORT": str(self.postgres.port),
            "TESSERA__POSTGRES__DATABASE": self.postgres.database,
            "TESSERA__POSTGRES__WORKER_PASSWORD": self.postgres.worker_password.get_secret_value(),
            "TESSERA__POSTGRES__CLIENT_PASSWORD": self.postgres.client_password.get_secret_value(),
            "TESSERA__TELEMETRY__TRACING": "false",
        }


class _Statements:
    """Collects the DDL that a migration would run."""

    def __init__(self, service: str) -> None:
        self.collected: list[str] = []
        self._service = service

    def execute(self, statement: str) -> None:
        self.collected.append(statement)

    def get_context(self) -> Any:
        return SimpleNamespace(opts={"version_table_schema": self._service})


def _new_settings(stack: Stack) -> PostgresSettings:
    address = urlsplit(stack.database_url)
    return PostgresSettings(
        host=unquote(address.hostname or ""),
        port=address.port or 5432,
        database=f"bus_{uuid4().hex[:12]}",
        worker_password=SecretStr("only-for-tests-worker"),
        client_password=SecretStr("only-for-tests-client"),
        owner_password=SecretStr("only-for-tests-owner"),
        breaker_reset_seconds=0.2,
    )


async def prepare_service(database_url: str, service: str, settings: PostgresSettings) -> None:
    """A schema with delivery tables and one table of effects."""
    await bootstrap(SecretStr(database_url), {service: settings})
    statements = _Statements(service)
    create_delivery_tables(statements)
    add_parked_events(statements)
    engine = owner_engine(service, settings)
    async with engine.begin() as connection:
        for statement in (*statements.collected, *_EFFECTS):
            await connection.execute(text(statement.replace("{service}", service)))
    await engine.dispose()


async def _drop(stack: Stack, settings: PostgresSettings) -> None:
    connection = await asyncpg.connect(stack.database_url)
    await connection.execute(f'DROP DATABASE IF EXISTS "{settings.database}" WITH (FORCE)')
    await connection.close()


def _own_topics(kafka: KafkaSettings, service: str) -> list[Wanted]:
    """What the service reads and writes; making every topic for every test would keep the broker busy with thousands of partitions."""
    names = {topic.name for topic in (*consumed_by(service), *produced_by(service), TOPICS["tenant.changed"])}
    own = (f".{service}.dlq", *(retry for retry, waiting in RETRY_TOPICS.items() if waiting.consumer.service == service))
    return [topic for topic in wanted_topics(kafka) if topic.name in names or topic.name.endswith(own)]


async def make_topics(kafka: KafkaSettings, service: str = SERVICE) -> None:
    """The topics of one service."""
    directory = TopicDirectory(kafka, "tests")
    await directory.start()
    await directory.ensure(_own_topics(kafka, service))
    await directory.stop()


async def _remove_topics(kafka: KafkaSettings) -> None:
    client = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await client.start()
    await client.delete_topics([name for name in await client.list_topics() if name.startswith(kafka.topic_prefix)])
    await client.close()


@pytest.fixture
def ground(stack: Stack) -> Iterator[Ground]:
    """A fresh database and fresh topics."""
    postgres = _new_settings(stack)
    kafka = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=unique_kafka_prefix(), keyed_partitions=2)

    async def prepare() -> None:
        await asyncio.gather(prepare_service(stack.database_url, SERVICE, postgres), make_topics(kafka))

    async def remove() -> None:
        await asyncio.gather(_drop(stack, postgres), _remove_topics(kafka))

    asyncio.run(prepare())
    yield Ground(postgres, kafka, stack.database_url.rpartition("/")[0] + f"/{postgres.database}")
    asyncio.run(remove())


@pytest.fixture
def grounds_of(ground: Ground, stack: Stack) -> Callable[[str], Awaitable[None]]:
    """Makes the same for another service, once: its topics, and its schema in the same database."""
    made: set[str] = set()

    async def prepare(service: str) -> None:
        if service in made:
            return
        made.add(service)
        await asyncio.gather(prepare_service(stack.database_url, service, ground.postgres), make_topics(ground.kafka, service))

    return prepare


@pytest.fixture(name="make_topics")
def topics_maker() -> Callable[[KafkaSettings], Awaitable[None]]:
    """Makes the service's topics on another broker."""
    return make_topics


@pytest.fixture
async def database(ground: Ground) -> AsyncIterator[Database]:
    """The service's database."""
    opened = Database(SERVICE, ground.postgres)
    yield opened
    await opened.close()
