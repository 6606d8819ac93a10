"""A database of the generator's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from tessera.storage import Database
from tessera.testkit import PostgresDatabase


@pytest.fixture(scope="module")
def prepared(postgres_database: Callable[..., PostgresDatabase]) -> PostgresDatabase:
    return postgres_database("generator")


@pytest.fixture
async def database(prepared: PostgresDatabase) -> AsyncIterator[Database]:
    opened = Database("generator", prepared.settings("generator"))
    yield opened
    await opened.close()
