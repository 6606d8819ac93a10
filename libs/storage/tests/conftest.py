"""A service called `sample` in a database of its own, with its roles and migrations."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr

from tessera.storage import Database, PostgresSettings
from tessera.storage.bootstrap import bootstrap
from tessera.storage.migrations import upgrade
from tessera.testkit.stack import Stack

SAMPLE = Path(__file__).parent / "sample" / "src"


@pytest.fixture(scope="session", autouse=True)
def sample_installed() -> Iterator[None]:
    sys.path.insert(0, str(SAMPLE))
    yield
    sys.path.remove(str(SAMPLE))


@pytest.fixture(scope="session")
def admin_url(stack: Stack) -> Iterator[SecretStr]:
    yield SecretStr(stack.database_url)
    asyncio.run(drop_roles(stack.database_url))


async def drop_roles(admin_url: str) -> None:
    admin = await asyncpg.connect(admin_url)
    for row in await admin.fetch(r"SELECT rolname FROM pg_roles WHERE rolname LIKE 'tessera\_sample%'"):
        await admin.execute(f"DROP ROLE {row['rolname']}")
    await admin.close()


def new_settings(admin_url: SecretStr) -> PostgresSettings:
    address = urlsplit(admin_url.get_secret_value())
    return PostgresSettings(
        host=unquote(address.hostname or ""),
        port=address.port or 5432,
        database=f"storage_{uuid4().hex[:12]}",
        worker_password=SecretStr("worker's password"),
        client_password=SecretStr("client's password"),
        owner_password=SecretStr("owner's password"),
        authenticator_password=SecretStr("authenticator's password"),
        breaker_reset_seconds=0.2,
    )


async def drop(admin_url: SecretStr, settings: PostgresSettings) -> None:
    admin = await asyncpg.connect(admin_url.get_secret_value())
    await admin.execute(f'DROP DATABASE IF EXISTS "{settings.database}" WITH (FORCE)')
    await admin.close()


@pytest.fixture(scope="session")
def postgres(admin_url: SecretStr) -> Iterator[PostgresSettings]:
    """Bootstrapped and migrated; shared by the tests of the run, which use tenants of their own."""
    settings = new_settings(admin_url)
    asyncio.run(bootstrap(admin_url, {"sample": settings}))
    asyncio.run(upgrade("sample", settings))
    yield settings
    asyncio.run(drop(admin_url, settings))


@pytest.fixture
async def empty_postgres(admin_url: SecretStr) -> AsyncIterator[PostgresSettings]:
    """Settings of a database that does not exist yet."""
    settings = new_settings(admin_url)
    yield settings
    await drop(admin_url, settings)


@pytest.fixture
async def database(postgres: PostgresSettings) -> AsyncIterator[Database]:
    database = Database("sample", postgres)
    yield database
    await database.close()


@pytest.fixture
def tenant() -> str:
    return f"tenant-{uuid4().hex}"
