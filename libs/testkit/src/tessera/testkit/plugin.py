"""The pytest plugin: `pytest_plugins = ["tessera.testkit.plugin"]` in the root conftest."""

from collections.abc import Iterator

import pytest

from tessera.testkit.events import unique_kafka_prefix
from tessera.testkit.stack import Stack, remove_abandoned


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Kafka, Postgres and Redis for this run. See `tessera.testkit.stack`."""
    remove_abandoned()
    started = Stack()
    started.start()
    yield started
    started.stop()


@pytest.fixture
def kafka_prefix() -> str:
    """A topic and group prefix of this test alone (`unique_kafka_prefix()` gives one to fixtures of a wider scope)."""
    return unique_kafka_prefix()
