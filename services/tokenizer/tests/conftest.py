"""The tokenizer's schema in a database of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from tessera.storage import Database
from tessera.testkit.databases import PostgresDatabase
from tessera.testkit.plugin import DatabaseFactory


@pytest.fixture(scope="module")
def postgres(postgres_database: DatabaseFactory) -> PostgresDatabase:
    """Migrated, tokens included; tests keep apart by tenant."""
    return postgres_database("tokenizer")


@pytest.fixture
async def database(postgres: PostgresDatabase) -> AsyncIterator[Database]:
    database = Database("tokenizer", postgres.settings("tokenizer"))
    yield database
    await database.close()


@pytest.fixture
def tenant() -> str:
    return f"tenant-{uuid4().hex[:12]}"
