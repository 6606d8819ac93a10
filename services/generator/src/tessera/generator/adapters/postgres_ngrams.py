"""N-gram counts in Postgres: the tables of `kneser_ney.CountTable`, per tenant and encoding.

A context is stored as its tokens, four bytes each, big-endian: exact, short and without collisions.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Final, Protocol

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.generator.domain.kneser_ney import (
    ORDER,
    Discounts,
    Distribution,
    Followers,
    Learned,
    Ngram,
    Occupancy,
    discounts,
    learning,
    unigram_distribution,
)
from tessera.generator.ports import NgramModel, TokenizedText
from tessera.storage import Database

_NO_OCCUPANCY: Final[Occupancy] = (0, 0, 0, 0)

# Texts of all tenants are learned one transaction at a time: two that learn the same n-grams in another order would deadlock.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('tessera.generator.ngram', 0))")
_REMEMBER = text(
    "INSERT INTO ngram_learned (tenant_id, encoding, memory_id, subject_id, composition_id, tokens) "
    "VALUES (:tenant_id, :encoding, :memory_id, :subject_id, :composition_id, :tokens) ON CONFLICT DO NOTHING RETURNING true"
)
_BUMP = text(
    "INSERT INTO ngram AS known (tenant_id, encoding, context, token, count) "
    "SELECT :tenant_id, :encoding, context, token, increment "
    "FROM unnest(CAST(:contexts AS bytea[]), CAST(:tokens AS integer[]), CAST(:increments AS bigint[])) AS new (context, token, increment) "
    "ON CONFLICT (tenant_id, encoding, context, token) DO UPDATE SET count = known.count + excluded.count "
    "RETURNING context, token, count AS seen"
)
_SHIFT = text(
    "INSERT INTO ngram_occupancy AS known (tenant_id, encoding, ngram_order, ones, twos, threes, fours) "
    "VALUES (:tenant_id, :encoding, :ngram_order, :ones, :twos, :threes, :fours) "
    "ON CONFLICT (tenant_id, encoding, ngram_order) DO UPDATE SET ones = known.ones + excluded.ones, twos = known.twos + excluded.twos, "
    "threes = known.threes + excluded.threes, fours = known.fours + excluded.fours"
)
_OCCUPANCIES = text(
    "SELECT ngram_order, ones, twos, threes, fours FROM ngram_occupancy WHERE tenant_id = :tenant_id AND encoding = :encoding"
)
_FOLLOWERS = text(
    "SELECT context, token, count AS seen FROM ngram "
    "WHERE tenant_id = :tenant_id AND encoding = :encoding AND context = ANY(CAST(:contexts AS bytea[]))"
)


class _HasConnection(Protocol):
    """A transaction of the bus."""

    @property
    def connection(self) -> AsyncConnection:
        """The open connection."""


def packed(ngram: Ngram) -> bytes:
    """The tokens as bytes."""
    return struct.pack(f">{len(ngram)}i", *ngram)


def unpacked(context: bytes) -> Ngram:
    """The inverse of `packed`."""
    return struct.unpack(f">{len(context) // 4}i", context)


class PostgresNgramLearner:
    """Learns in the transaction of the event being handled."""

    def __init__(self, transaction: _HasConnection) -> None:
        self._connection = transaction.connection

    async def learn(self, tokenized: TokenizedText) -> bool:
        """One statement per order, and one for the occupancies."""
        await self._connection.execute(_LOCK)
        if not await self._remember(tokenized):
            return False
        model = {"tenant_id": tokenized.tenant_id, "encoding": tokenized.encoding}
        steps = learning(tokenized.tokens)
        try:
            increments = next(steps)
            while True:
                increments = steps.send(await self._bump(model, increments))
        except StopIteration as finished:
            await self._shift(model, finished.value)
        return True

    async def _remember(self, tokenized: TokenizedText) -> bool:
        values = {
            "tenant_id": tokenized.tenant_id,
            "encoding": tokenized.encoding,
            "memory_id": tokenized.memory_id,
            "subject_id": tokenized.subject_id,
            "composition_id": bytes.fromhex(tokenized.composition_id),
            "tokens": len(tokenized.tokens),
        }
        return (await self._connection.execute(_REMEMBER, values)).first() is not None

    async def _bump(self, model: Mapping[str, str], increments: Mapping[Ngram, int]) -> Mapping[Ngram, int]:
        values = {
            **model,
            "contexts": [packed(ngram[:-1]) for ngram in increments],
            "tokens": [ngram[-1] for ngram in increments],
            "increments": list(increments.values()),
        }
        rows = await self._connection.execute(_BUMP, values)
        return {(*unpacked(row.context), row.token): row.seen for row in rows}

    async def _shift(self, model: Mapping[str, str], learned: Learned) -> None:
        changes = [
            {**model, "ngram_order": order, "ones": change[0], "twos": change[1], "threes": change[2], "fours": change[3]}
            for order, change in learned.occupancy_changes.items()
            if any(change)
        ]
        if changes:
            await self._connection.execute(_SHIFT, changes)


class _Snapshot:
    """An NgramModel on an open transaction."""

    def __init__(
        self, connection: AsyncConnection, model: Mapping[str, str], occupancies: Mapping[int, Occupancy], unigrams: Followers
    ) -> None:
        self._connection = connection
        self._model = model
        self._occupancies = occupancies
        self._unigrams = unigrams
        self._discounts = {order: discounts(occupancies.get(order, _NO_OCCUPANCY)) for order in range(1, ORDER + 1)}
        self._seen: dict[Ngram, Followers | None] = {}

    @cached_property
    def unigrams(self) -> Distribution:
        if not len(self._unigrams):
            return Distribution(self._unigrams.tokens, self._unigrams.counts.astype(float), 1.0)
        return unigram_distribution(self._unigrams, self._occupancies.get(1, _NO_OCCUPANCY))

    def discounts(self, order: int) -> Discounts:
        return self._discounts[order]

    async def followers(self, contexts: Sequence[Ngram]) -> Mapping[Ngram, Followers]:
        missing = [context for context in contexts if context not in self._seen]
        if missing:
            found = await followers(self._connection, self._model, missing)
            self._seen.update({context: found.get(context) for context in missing})
        return {context: seen for context in contexts if (seen := self._seen[context]) is not None}


class PostgresNgramReader:
    """Opens one tenant's tables, under row-level security."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def snapshot(self, tenant_id: str, encoding: str) -> AsyncIterator[NgramModel]:
        """A repeatable-read transaction of the client role; the unigrams are read once, contexts as they are asked for."""
        model = {"tenant_id": tenant_id, "encoding": encoding}
        async with self._database.reading(tenant_id) as connection:
            unigrams = (await followers(connection, model, [()])).get((), Followers.of(()))
            yield _Snapshot(connection, model, await occupancies(connection, model), unigrams)


async def occupancies(connection: AsyncConnection, model: Mapping[str, str]) -> dict[int, Occupancy]:
    """The occupancy of each order that has n-grams."""
    rows = await connection.execute(_OCCUPANCIES, dict(model))
    return {row.ngram_order: (row.ones, row.twos, row.threes, row.fours) for row in rows}


async def followers(connection: AsyncConnection, model: Mapping[str, str], contexts: Sequence[Ngram]) -> dict[Ngram, Followers]:
    """What followed each of the contexts that were ever seen; one round trip."""
    counts: dict[Ngram, list[tuple[int, int]]] = defaultdict(list)
    for row in await connection.execute(_FOLLOWERS, {**model, "contexts": [packed(context) for context in contexts]}):
        counts[unpacked(row.context)].append((row.token, row.seen))
    return {context: Followers.of(pairs) for context, pairs in counts.items()}
