"""How fast `local/ngram` learns and generates on this machine.

    pytest -s services/generator/tests/bench/ngram_speed.py

Its name keeps it out of `make test`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

import tessera.generator
from tessera.encodings import encoding
from tessera.generator.adapters.local_engines import NgramEngine
from tessera.generator.adapters.postgres_ngrams import PostgresNgramLearner, PostgresNgramReader
from tessera.generator.ports import Job, TokenizedText
from tessera.storage import Database
from tessera.testkit import PostgresDatabase

pytestmark = [pytest.mark.bench, pytest.mark.integration, pytest.mark.timeout(300)]
ENCODING = "o200k_base"


def corpus() -> list[list[int]]:
    """The service's own sources, one text per paragraph."""
    files = sorted(Path(tessera.generator.__path__[0]).rglob("*.py"))
    paragraphs = [paragraph for file in files for paragraph in file.read_text().split("\n\n") if paragraph.strip()]
    random.Random(1).shuffle(paragraphs)
    return [encoding(ENCODING).encode(paragraph) for paragraph in paragraphs]


async def test_learning_and_generating(postgres_database: Callable[..., PostgresDatabase], leased_job: Callable[..., Job]) -> None:
    database = Database("generator", postgres_database("generator").settings("generator"))
    learning, tokens = await learned(database, corpus())
    engine = NgramEngine(PostgresNgramReader(database), ENCODING)
    pieces, began = 0, time.perf_counter()
    for seed in range(20):
        job = leased_job("local/ngram", prompt="def ", parameters={"seed": seed, "max_tokens": 200})
        pieces += len([piece async for piece in engine.generate(job)])
    generating = time.perf_counter() - began
    async with database.transaction() as connection:
        rows = await connection.scalar(text("SELECT count(*) FROM ngram"))
    await database.close()
    learned_at, generated_at = tokens / learning, pieces / generating
    report = f"learned {tokens} tokens at {learned_at:,.0f}/s into {rows} rows; generated {pieces} tokens at {generated_at:,.0f}/s"
    print(report)  # noqa: T201
    assert pieces > 100


async def learned(database: Database, texts: list[list[int]]) -> tuple[float, int]:
    """Seconds and tokens of learning, 50 texts per transaction."""
    began = time.perf_counter()
    for start in range(0, len(texts), 50):
        async with database.transaction() as connection:
            learner: Any = PostgresNgramLearner(SimpleNamespace(connection=connection))
            for number, tokens in enumerate(texts[start : start + 50], start):
                await learner.learn(TokenizedText("acme", None, str(number), ENCODING, tokens, "ab" * 32))
    return time.perf_counter() - began, sum(map(len, texts))
