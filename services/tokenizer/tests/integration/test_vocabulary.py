"""The vocabulary on a real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text as sql
from sqlalchemy.exc import ProgrammingError

from tessera.contracts.errors import InvalidError
from tessera.encodings import ENCODING_NAMES, encoding
from tessera.storage import Database
from tessera.storage.migrations import upgrade
from tessera.testkit.databases import PostgresDatabase
from tessera.tokenizer.adapters.postgres import PostgresVocabulary
from tessera.tokenizer.domain.composition import Composed, Composition, compose, composition_id, token_id
from tessera.tokenizer.ports import Provenance

pytestmark = pytest.mark.integration

HERE = Provenance("memory", "m1", "subject-1")
TEXT = "Die Katze schläft. 世界，你好！ 👩‍👩‍👧‍👦 slept.\nAnd a second line, with the same cat. Die Katze schläft."


def composed(text: str) -> Composed:
    chosen = encoding("o200k_base")
    return compose([chosen.token_bytes(token) for token in chosen.encode(text)])


async def rows(database: Database, tenant: str, table: str) -> int:
    async with database.transaction() as connection:
        return int(await connection.scalar(sql(f"SELECT count(*) FROM {table} WHERE tenant_id = :tenant"), {"tenant": tenant}))


async def test_a_stored_text_is_read_back_exactly(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    await vocabulary.store(tenant, composed(TEXT), HERE)
    assert (await vocabulary.text(tenant, composed(TEXT).root)).decode() == TEXT


async def test_any_text_is_read_back_exactly(database: Database, tenant: str) -> None:
    """Hypothesis draws the texts; one event loop and one database serve them all."""
    drawn: list[str] = []

    @given(text=st.text(max_size=200))
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def draw(text: str) -> None:
        drawn.append(text)

    draw()
    vocabulary = PostgresVocabulary(database)
    for text in drawn:
        await vocabulary.store(tenant, composed(text), HERE)
        if text:
            assert (await vocabulary.text(tenant, composed(text).root)).decode() == text
    assert len(drawn) >= 40


async def test_the_empty_text_is_stored_too(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    await vocabulary.store(tenant, composed(""), HERE)
    assert await vocabulary.text(tenant, composition_id([])) == b""


async def test_storing_again_changes_nothing(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    counts: list[list[int]] = []
    for _ in range(2):
        await vocabulary.store(tenant, composed(TEXT), HERE)
        counts.append([await rows(database, tenant, table) for table in ("composition", "composition_child", "composition_source")])
    assert counts[0] == counts[1]
    assert counts[0][2] == 1


async def test_parts_are_shared_between_texts(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    await vocabulary.store(tenant, composed("It rained all day. Nobody went out."), HERE)
    before = await rows(database, tenant, "composition")
    await vocabulary.store(tenant, composed("It rained all day."), Provenance("memory", "m2", None))
    assert await rows(database, tenant, "composition") == before
    assert await rows(database, tenant, "composition_source") == 2


async def test_another_tenants_composition_is_not_found(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    await vocabulary.store(tenant, composed(TEXT), HERE)
    with pytest.raises(InvalidError) as caught:
        await vocabulary.text(f"other-{uuid4().hex[:8]}", composed(TEXT).root)
    assert caught.value.code == "composition_not_found"


async def test_rows_of_another_tenant_do_not_exist_for_the_client_role(database: Database, tenant: str) -> None:
    await PostgresVocabulary(database).store(tenant, composed(TEXT), HERE)
    async with database.reading(f"other-{uuid4().hex[:8]}") as connection:
        for table in ("composition", "composition_child", "composition_source"):
            assert await connection.scalar(sql(f"SELECT count(*) FROM {table}")) == 0


@pytest.mark.parametrize("statement", ["DELETE FROM token", "UPDATE token SET bytes = bytes", "DELETE FROM composition"])
async def test_the_client_role_cannot_change_what_is_stored(database: Database, tenant: str, statement: str) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with database.writing(tenant) as connection:
            await connection.execute(sql(statement))


async def test_every_single_token_is_there_for_every_tenant(database: Database) -> None:
    expected = {token for name in ENCODING_NAMES for _, token in encoding(name).ordinary_tokens()}
    async with database.reading("anybody") as connection:
        found = {row.id: row.bytes for row in await connection.execute(sql("SELECT id, bytes FROM token"))}
    assert found == {token_id(token): token for token in expected}
    assert await PostgresVocabulary(database).text("anybody", token_id(b"hello")) == b"hello"


async def test_migrating_again_does_nothing(database: Database, postgres: PostgresDatabase) -> None:
    await upgrade("tokenizer", postgres.settings("tokenizer"))
    async with database.reading("anybody") as connection:
        assert await connection.scalar(sql("SELECT count(*) = count(DISTINCT bytes) FROM token"))


async def test_an_id_with_another_content_is_refused(database: Database, tenant: str) -> None:
    """What no SHA-256 will do, done by hand: the same id for two contents."""
    vocabulary = PostgresVocabulary(database)
    made = composed(TEXT)
    victim = next(key for key in made.compositions if key != made.root)
    await vocabulary.store(tenant, Composed(victim, {victim: Composition((token_id(b"x"), token_id(b"y")), 2)}), HERE)
    with pytest.raises(InvalidError) as caught:
        await vocabulary.store(tenant, made, HERE)
    assert caught.value.code == "composition_conflict"
    assert await rows(database, tenant, "composition") == 1


async def test_damage_in_the_database_is_noticed(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    await vocabulary.store(tenant, composed(TEXT), HERE)
    async with database.transaction() as connection:
        damage = sql("UPDATE composition_child SET child_id = :id WHERE tenant_id = :tenant AND composition_id = :root AND ordinal = 0")
        await connection.execute(damage, {"tenant": tenant, "root": composed(TEXT).root, "id": token_id(b"x")})
    with pytest.raises(InvalidError) as caught:
        await vocabulary.text(tenant, composed(TEXT).root)
    assert caught.value.code == "composition_corrupt"


async def test_many_writers_of_the_same_words_do_not_block_each_other_forever(database: Database, tenant: str) -> None:
    vocabulary = PostgresVocabulary(database)
    sentences = ["First things first.", " Second helpings.", " Third time lucky.", " Fourth estate."]
    texts = ["".join(sentences[n:] + sentences[:n]) + f" {n} {m}" for n in range(4) for m in range(5)]
    await asyncio.gather(*(vocabulary.store(tenant, composed(text), HERE) for text in texts))
    found: list[Any] = [await vocabulary.text(tenant, composed(text).root) for text in texts]
    assert found == [text.encode() for text in texts]
