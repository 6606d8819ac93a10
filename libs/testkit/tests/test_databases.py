"""Test databases are migrated, apart from each other, and gone afterwards."""

import asyncpg
import pytest

from tessera.testkit import Stack, new_database

pytestmark = pytest.mark.integration


async def _databases(stack: Stack) -> set[str]:
    connection = await asyncpg.connect(stack.database_url)
    names = {row["datname"] for row in await connection.fetch("select datname from pg_database")}
    await connection.close()
    return names


async def test_a_database_has_the_schemas_of_its_services_and_is_dropped(stack: Stack) -> None:
    database = new_database(stack, ["memory"])
    connection = await asyncpg.connect(database.admin_url)
    schemas = {row["nspname"] for row in await connection.fetch("select nspname from pg_namespace")}
    await connection.close()
    assert "memory" in schemas
    assert "retention" not in schemas
    assert database.name in await _databases(stack)
    database.drop()
    assert database.name not in await _databases(stack)


async def test_a_service_finds_its_database(stack: Stack) -> None:
    database = new_database(stack, ["memory"])
    settings = database.settings("memory")
    connection = await asyncpg.connect(
        host=settings.host,
        port=settings.port,
        database=settings.database,
        user="tessera_memory_worker",
        password=settings.worker_password.get_secret_value(),
    )
    assert await connection.fetchval("select current_database()") == database.name
    await connection.close()
    database.drop()
