"""The pytest plugin: `pytest_plugins = ["tessera.testkit.plugin"]` in the root conftest."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping

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


SUITES = ("bench", "chaos", "e2e", "contract", "integration", "unit")
_ELAPSED = pytest.StashKey[dict[str, tuple[int, float]]]()


def suite_of(item: pytest.Item) -> str:
    """The suite of a test: its marker, else the folder that it lies in, else `unit`."""
    marked = next((suite for suite in SUITES if item.get_closest_marker(suite)), None)
    return marked or next((suite for suite in SUITES if suite in item.path.parts), "unit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Add up the time of each suite, fixtures included."""
    started = time.perf_counter()
    try:
        return (yield)
    finally:
        elapsed = item.config.stash.setdefault(_ELAPSED, {})
        count, seconds = elapsed.get(suite_of(item), (0, 0.0))
        elapsed[suite_of(item)] = (count + 1, seconds + time.perf_counter() - started)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the time of each suite."""
    elapsed = config.stash.get(_ELAPSED, {})
    if elapsed:
        terminalreporter.section("time per suite")
        for suite, (count, seconds) in sorted(elapsed.items(), key=lambda entry: -entry[1][1]):
            terminalreporter.write_line(f"{suite:<12} {count:>5} tests {seconds:>8.1f} s")
