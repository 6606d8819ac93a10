"""The n-gram tables in Postgres are those of the specification in memory, and belong to their tenant."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.generator.adapters.postgres_ngrams import PostgresNgramLearner, PostgresNgramReader, occupancies, unpacked
from tessera.generator.domain.kneser_ney import START, CountTable, contexts, interpolated
from tessera.generator.ports import TokenizedText
from tessera.storage import Database

pytestmark = pytest.mark.integration
ENCODING = "o200k_base"


@dataclass
class Unit:
    connection: AsyncConnection


def text_of(tenant_id: str, tokens: Sequence[int], memory_id: str | None = None) -> TokenizedText:
    return TokenizedText(tenant_id, "someone", memory_id or str(uuid4()), ENCODING, tokens, "ab" * 32)


def corpus(seed: int, size: int = 40) -> list[list[int]]:
    """Texts with much repetition, so that counts of every size come up."""
    source = random.Random(seed)
    return [[int(source.paretovariate(1.1)) % 30 for _ in range(source.randint(1, 25))] for _ in range(size)]


async def learn(database: Database, tenant_id: str, texts: Sequence[Sequence[int]]) -> None:
    async with database.transaction() as connection:
        learner = PostgresNgramLearner(Unit(connection))
        for tokens in texts:
            assert await learner.learn(text_of(tenant_id, tokens))


async def stored(database: Database, tenant_id: str) -> CountTable:
    """The tables as the client role sees them."""
    table = CountTable()
    async with database.reading(tenant_id) as connection:
        for row in await connection.execute(text("SELECT context, token, count AS seen FROM ngram")):
            table.counts[(*unpacked(row.context), row.token)] = row.seen
        table.occupancies |= await occupancies(connection, {"tenant_id": tenant_id, "encoding": ENCODING})
    return table


def in_memory(texts: Sequence[Sequence[int]]) -> CountTable:
    table = CountTable()
    for tokens in texts:
        table.learn(tokens)
    return table


async def test_incremental_tables_equal_the_specification(database: Database) -> None:
    tenant_id, texts = f"t{uuid4().hex[:8]}", corpus(1)
    for tokens in texts[:10]:
        await learn(database, tenant_id, [tokens])
    await learn(database, tenant_id, texts[10:])
    assert await stored(database, tenant_id) == in_memory(texts)


async def test_order_of_learning_changes_nothing(database: Database) -> None:
    forward, backward = f"t{uuid4().hex[:8]}", f"t{uuid4().hex[:8]}"
    await learn(database, forward, corpus(2))
    await learn(database, backward, corpus(2)[::-1])
    assert await stored(database, forward) == await stored(database, backward)


async def test_a_text_is_learned_once(database: Database) -> None:
    tenant_id, memory_id = f"t{uuid4().hex[:8]}", str(uuid4())
    async with database.transaction() as connection:
        learner = PostgresNgramLearner(Unit(connection))
        assert await learner.learn(text_of(tenant_id, [1, 2, 3], memory_id))
        assert not await learner.learn(text_of(tenant_id, [1, 2, 3], memory_id))
    assert await stored(database, tenant_id) == in_memory([[1, 2, 3]])


async def test_a_rolled_back_text_leaves_nothing(database: Database) -> None:
    tenant_id = f"t{uuid4().hex[:8]}"

    async def fail() -> None:
        async with database.transaction() as connection:
            await PostgresNgramLearner(Unit(connection)).learn(text_of(tenant_id, [1, 2, 3]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    assert await stored(database, tenant_id) == CountTable()


async def test_snapshot_predicts_as_the_specification(database: Database) -> None:
    tenant_id, texts = f"t{uuid4().hex[:8]}", corpus(3)
    await learn(database, tenant_id, texts)
    table = in_memory(texts)
    async with PostgresNgramReader(database).snapshot(tenant_id, ENCODING) as model:
        for history in ([START], [START, *texts[0][:3]], [START, 1, 1, 1, 1, 1], [START, 999, 1]):
            seen = await model.followers(contexts(history))
            found = model.unigrams
            for context in (context for context in contexts(history) if context in seen):
                found = interpolated(found, seen[context], model.discounts(len(context) + 1))
            expected = table.distribution(history)
            assert found.probabilities.sum() + found.unknown == pytest.approx(1, abs=1e-9)
            assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-12)


async def test_another_tenant_sees_nothing(database: Database) -> None:
    tenant_id = f"t{uuid4().hex[:8]}"
    await learn(database, tenant_id, corpus(4))
    async with database.reading("somebody-else") as connection:
        for table in ("ngram", "ngram_occupancy", "ngram_learned"):
            assert await connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0
    async with PostgresNgramReader(database).snapshot("somebody-else", ENCODING) as model:
        assert len(model.unigrams.vocabulary) == 0
