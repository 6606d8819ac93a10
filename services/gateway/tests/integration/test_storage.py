"""Roles and tenancy in Postgres: who sees what."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tessera.contracts import uuid7
from tessera.gateway.adapters.active_tenants import PostgresActiveTenants
from tessera.gateway.adapters.answers import PostgresAnswers
from tessera.gateway.adapters.call_sums import PostgresCallSums
from tessera.gateway.adapters.postgres import PostgresGenerations, PostgresKeys
from tessera.gateway.adapters.stored import PostgresStoredCompletions
from tessera.gateway.domain.calls import CallRow, Counted
from tessera.gateway.domain.records import Since
from tessera.gateway.ports import CallQuestion, KeptAnswer, NewStored, Repeat, StoredPage
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


@pytest.mark.parametrize(
    "table", ["tenants", "api_keys", "datasets", "generations", "stored_completions", "dead_letter_decisions", "outbox"]
)
async def test_the_authenticator_reads_no_table(database: Database, table: str) -> None:
    async with database.authenticating() as connection:
        with pytest.raises(DBAPIError, match="permission denied"):
            await connection.execute(text(f"SELECT * FROM {table}"))


async def test_the_authenticator_sees_whether_a_tenant_is_active(database: Database) -> None:
    tenants = PostgresActiveTenants(database)
    active, suspended = await tenant(database), await tenant(database, state="suspended")
    assert [await tenants.is_active(name) for name in (active, suspended, "nobody")] == [True, False, False]
    async with database.writing(active) as connection:
        with pytest.raises(DBAPIError, match="permission denied"):
            await connection.execute(text("SELECT tenant_is_active('x')"))


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


def new_stored(name: str, *, second: int = 0, **more: Any) -> NewStored:
    made = NewStored(
        id=name,
        model="m",
        metadata={},
        request='{"messages": []}',
        subject_id=None,
        since=Since(1, 2),
        created_at=NOW + timedelta(seconds=second),
        look_at=NOW - timedelta(seconds=1),
    )
    return replace(made, **more)


async def kept(stored: PostgresStoredCompletions, tenant_id: str, *names: str, **more: Any) -> None:
    for second, name in enumerate(names):
        await stored.begin(tenant_id, new_stored(name, second=second, **more))
        await stored.answer(tenant_id, name, "{}")


async def test_a_stored_completion_is_its_tenants(database: Database) -> None:
    mine, other = await tenant(database), await tenant(database)
    stored = PostgresStoredCompletions(database)
    await kept(stored, mine, "a")
    assert (await stored.find(mine, "a"), await stored.find(other, "a")) == ((await stored.page(mine, StoredPage(5)) or [None])[0], None)
    assert await stored.page(other, StoredPage(5)) == []
    assert await stored.page(other, StoredPage(5, after="a")) is None
    assert await stored.label(other, "a", {"x": "y"}) is None
    assert not await stored.delete(other, "a")
    assert await stored.delete(mine, "a")
    assert await stored.find(mine, "a") is None


async def test_without_an_answer_it_is_not_there(database: Database) -> None:
    mine, stored = await tenant(database), PostgresStoredCompletions(database)
    await stored.begin(mine, new_stored("a"))
    assert (await stored.find(mine, "a"), await stored.page(mine, StoredPage(5)), await stored.label(mine, "a", {})) == (None, [], None)
    await stored.begin(mine, new_stored("a", model="another"))
    for answer in ("first", "second"):
        await stored.answer(mine, "a", answer)
    await stored.give_up(mine, "a")
    found = await stored.find(mine, "a")
    assert found is not None
    assert (found.answer, found.model, found.since) == ("first", "m", Since(1, 2))


async def test_pages_of_stored_completions(database: Database) -> None:
    mine, stored = await tenant(database), PostgresStoredCompletions(database)
    await kept(stored, mine, "a", "b", metadata={"topic": "keys", "n": "1"})
    await kept(stored, mine, "c", model="other")

    async def ids(**wanted: Any) -> list[str]:
        page = await stored.page(mine, StoredPage(**{"limit": 5, **wanted}))
        assert page is not None
        return [row.id for row in page]

    assert await ids() == ["a", "c", "b"]
    assert await ids(newest_first=True) == ["b", "c", "a"]
    assert await ids(limit=1, after="a") == ["c"]
    assert await ids(newest_first=True, after="c") == ["a"]
    assert await ids(model="other") == ["c"]
    assert await ids(metadata={"topic": "keys"}) == ["a", "b"]
    await stored.label(mine, "a", {"topic": "locks"})
    assert await ids(metadata={"topic": "keys"}) == ["b"]


async def test_what_has_not_ended_is_given_to_one_replica_at_a_time(database: Database) -> None:
    mine, stored = await tenant(database), PostgresStoredCompletions(database)
    for name in ("a", "b"):
        await stored.begin(mine, new_stored(name))
    await stored.begin(mine, new_stored("later", look_at=NOW + timedelta(hours=1)))
    looks = await asyncio.gather(*(stored.overdue(10, timedelta(minutes=1)) for _ in range(3)))
    assert sorted(row.id for look in looks for row in look if row.tenant_id == mine) == ["a", "b"]


async def test_old_ones_are_deleted(database: Database) -> None:
    mine, stored = await tenant(database), PostgresStoredCompletions(database)
    await kept(stored, mine, "new")
    await kept(stored, mine, "old", created_at=NOW - timedelta(days=31))
    assert await stored.expire(timedelta(days=30), 10) == 1
    assert [row.id for row in await stored.page(mine, StoredPage(5)) or ()] == ["new"]


async def test_an_idempotency_key_is_taken_once_answered_for_good_and_taken_over_when_its_holder_died(database: Database) -> None:
    mine, other = await tenant(database), await tenant(database)
    answers, repeat, minute = PostgresAnswers(database), Repeat("POST /v1/x", "k", b"d" * 16), timedelta(minutes=1)
    assert (await answers.claim(mine, repeat, minute)).mine
    assert not (await answers.claim(mine, repeat, minute)).mine
    assert not (await answers.claim(mine, replace(repeat, body_digest=b"e" * 16), minute)).same_body
    assert (await answers.claim(other, repeat, -minute)).mine
    assert (await answers.claim(other, repeat, minute)).mine
    await answers.keep(mine, repeat, 201, '{"a": 1}')
    await answers.keep(mine, repeat, 201, "another")
    await answers.release(mine, repeat)
    assert await answers.claim(mine, repeat, -minute) == KeptAnswer(False, True, 201, '{"a": 1}')
    await answers.release(other, repeat)
    assert (await answers.claim(other, repeat, minute)).mine
    assert await answers.expire(timedelta(days=1), 10) == 0


async def test_calls_are_added_once_and_seen_by_their_own_tenant(database: Database) -> None:
    mine, other, day = await tenant(database), await tenant(database), NOW.date()
    sums, one, two = PostgresCallSums(database), uuid7(), uuid7()
    rows = [(Counted(name, day, "k", "GET /a"), 2, 1) for name in sorted((mine, other))]
    await asyncio.gather(sums.add(one, *rows), sums.add(two, *rows), sums.add(one, *rows))
    await sums.add(two, *rows)
    question = CallQuestion(day, day, ("day", "operation"), 10)
    assert await sums.sums(mine, question) == [CallRow(day, None, "GET /a", 4, 2)]
    assert await sums.sums(mine, replace(question, operation="GET /b")) == []
    assert await sums.sums(mine, replace(question, groups=())) == [CallRow(None, None, None, 4, 2)]


async def test_many_at_once_take_an_idempotency_key_once(database: Database) -> None:
    mine = await tenant(database)
    answers, repeat = PostgresAnswers(database), Repeat("POST /v1/x", "k", b"d" * 16)
    claims = await asyncio.gather(*(answers.claim(mine, repeat, timedelta(minutes=1)) for _ in range(8)))
    assert [claim.mine for claim in claims].count(True) == 1
