"""Roles and tenancy in Postgres: who sees what."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tessera.contracts import uuid7
from tessera.gateway.adapters.postgres import PostgresGenerations, PostgresKeys
from tessera.gateway.ports import Since
from tessera.storage import Database

pytestmark = pytest.mark.integration

NOW = datetime.now(UTC)


@pytest.fixture
async def database(gateway: Any) -> AsyncIterator[Database]:
    opened = Database("gateway", gateway.database.settings("gateway"))
    yield opened
    await opened.close()


async def tenant(database: Database, **more: Any) -> str:
    name = f"t-{uuid7().hex[-12:]}"
    values = {"id": name, "state": "active", "now": NOW, **more}
    async with database.transaction() as connection:
        await connection.execute(text("INSERT INTO tenants (tenant_id, name, state, created_at) VALUES (:id, :id, :state, :now)"), values)
        await connection.execute(
            text(
                "INSERT INTO api_keys (tenant_id, id, name, environment, digest, scopes, created_at)"
                " VALUES (:id, :id, 'n', 'test', :digest, '{inference}', :now)"
            ),
            {**values, "digest": b"d" * 32},
        )
    return name


async def test_a_client_sees_its_own_tenant_and_no_key(database: Database) -> None:
    mine, other = await tenant(database), await tenant(database)
    async with database.reading(mine) as connection:
        assert (await connection.execute(text("SELECT tenant_id FROM tenants"))).scalars().all() == [mine]
        with pytest.raises(DBAPIError, match="permission denied"):
            await connection.execute(text("SELECT * FROM api_keys"))
    assert other != mine


async def test_a_client_cannot_write_for_another_tenant(database: Database) -> None:
    mine, other = await tenant(database), await tenant(database)
    async with database.writing(mine) as connection:
        with pytest.raises(DBAPIError, match="row-level security"):
            await connection.execute(
                text(
                    "INSERT INTO datasets (tenant_id, id, object_key, format, size_bytes, sha256) VALUES (:tenant, 'd', 'k', 'csv', 1, 'x')"
                ),
                {"tenant": other},
            )


@pytest.mark.parametrize("table", ["tenants", "api_keys", "datasets", "generations", "dead_letter_decisions", "outbox"])
async def test_the_authenticator_reads_no_table(database: Database, table: str) -> None:
    async with database.authenticating() as connection:
        with pytest.raises(DBAPIError, match="permission denied"):
            await connection.execute(text(f"SELECT * FROM {table}"))


async def test_the_authenticator_finds_one_key_of_an_active_tenant(database: Database) -> None:
    keys = PostgresKeys(database)
    active, suspended = await tenant(database), await tenant(database, state="suspended")
    found = await keys.find(active)
    assert found is not None
    assert (found.tenant_id, found.digest, found.scopes) == (active, b"d" * 32, frozenset({"inference"}))
    assert await keys.find(suspended) is None
    assert await keys.find("' OR true --") is None


async def test_only_one_of_many_claims_is_the_first(database: Database) -> None:
    name = await tenant(database)
    generations = PostgresGenerations(database)
    claims = await asyncio.gather(*(generations.claim(name, "g", b"d" * 16, Since(number, number)) for number in range(5)))
    assert sum(claim.first for claim in claims) == 1
    assert len({(claim.since, claim.created_at) for claim in claims}) == 1
    assert not (await generations.claim(name, "g", b"e" * 16, Since(0, 0))).same_body
