"""The pytest plugin: `pytest_plugins = ["tessera.testkit.plugin"]` in the root conftest."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import pytest

from tessera.testkit.databases import PostgresDatabase, new_database
from tessera.testkit.events import unique_kafka_prefix
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack, remove_abandoned

DatabaseFactory = Callable[..., PostgresDatabase]
"""`postgres_database("memory", "retention")`."""
ServiceFactory = Callable[..., ServiceProcess]
"""`service_process("memory", database=…, kafka_prefix=…, environment={…}, wait=True)`."""


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Kafka, Postgres and Redis for this run. See `tessera.testkit.stack`."""
    remove_abandoned()
    started = Stack()
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def postgres_database(stack: Stack) -> Iterator[DatabaseFactory]:
    """Makes a fresh, migrated database for the services named; the module's databases are dropped at its end."""
    with contextlib.ExitStack() as made:

        def create(*services: str) -> PostgresDatabase:
            database = new_database(stack, services)
            made.callback(database.drop)
            return database

        yield create


@pytest.fixture
def kafka_prefix() -> str:
    """A topic and group prefix of this test alone (`unique_kafka_prefix()` gives one to fixtures of a wider scope)."""
    return unique_kafka_prefix()


@pytest.fixture
def service_process(stack: Stack) -> Iterator[ServiceFactory]:
    """Starts real service processes, which are stopped at the end of the test."""
    with contextlib.ExitStack() as started:

        def start(
            service: str,
            *,
            database: PostgresDatabase | None = None,
            kafka_prefix: str = "",
            environment: Mapping[str, str] | None = None,
            wait: bool = True,
        ) -> ServiceProcess:
            process = ServiceProcess(service, stack, database, kafka_prefix, environment or {})
            started.callback(process.stop)
            process.start()
            if wait:
                process.wait_ready()
            return process

        yield start
