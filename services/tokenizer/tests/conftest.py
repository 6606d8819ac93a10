"""The tokenizer's schema in a database of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr

from tessera.storage import Database, PostgresSettings
from tessera.storage.bootstrap import bootstrap
from tessera.storage.migrations import upgrade
from tessera.testkit.stack import Stack


async def _drop(url: str, name: str) -> None:
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    finally:
        await admin.close()


@pytest.fixture(scope="session")
def postgres(stack: Stack) -> Iterator[PostgresSettings]:
    """Bootstrapped and migrated; tests keep apart by tenant."""
    address = urlsplit(stack.database_url)
    settings = PostgresSettings(
        host=unquote(address.hostname or ""),
        port=address.port or 5432,
        database=f"tokenizer_{uuid4().hex[:12]}",
        worker_password=SecretStr("worker"),
        client_password=SecretStr("client"),
        owner_password=SecretStr("owner"),
        breaker_reset_seconds=0.2,
    )
    asyncio.run(bootstrap(SecretStr(stack.database_url), {"tokenizer": settings}))
    asyncio.run(upgrade("tokenizer", settings))
    yield settings
    asyncio.run(_drop(stack.database_url, settings.database))


@pytest.fixture
async def database(postgres: PostgresSettings) -> AsyncIterator[Database]:
    database = Database("tokenizer", postgres)
    yield database
    await database.close()


@pytest.fixture
def tenant() -> str:
    return f"tenant-{uuid4().hex[:12]}"
