"""Memory's schema in a database of its own, the real embedder, and events as the bus hands them over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from tessera.memory.adapters.minilm import MiniLmEmbedder
from tessera.storage import Database
from tessera.testkit.databases import PostgresDatabase
from tessera.testkit.plugin import DatabaseFactory


@pytest.fixture(scope="module")
def postgres(postgres_database: DatabaseFactory) -> PostgresDatabase:
    """Migrated; tests keep apart by tenant."""
    return postgres_database("memory")


@pytest.fixture
async def database(postgres: PostgresDatabase) -> AsyncIterator[Database]:
    database = Database("memory", postgres.settings("memory"))
    yield database
    await database.close()


@pytest.fixture
def tenant() -> str:
    return f"tenant-{uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def embedder() -> MiniLmEmbedder:
    """The real model; its thread ends with the process."""
    return MiniLmEmbedder()
