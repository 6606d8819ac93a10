"""Reads that must be fresh, on a real Postgres: writers, index workers and readers race, and no reader is answered too early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tessera.bus import Position, Received, Transaction, outbox
from tessera.bus.consistency import Standing, Target, Write, judge
from tessera.bus.freshness import seen_in
from tessera.bus.inbox import InboxItem, enter
from tessera.bus.outbox import OutboxRow
from tessera.bus.positions import PositionRow
from tessera.contracts.base import EventData
from tessera.contracts.events import (
    AwaitedWrite,
    FreshnessInspected,
    LogEnd,
    LogPlace,
    MessagePublished,
    ReadConsistency,
    RecallCompleted,
    RecallFilter,
    RecallRequested,
    TenantChanged,
)
from tessera.contracts.ids import body_digest, identity_digest
from tessera.memory.adapters.admission import PostgresUnit
from tessera.memory.adapters.announcements import Announcements
from tessera.memory.adapters.indexing import PostgresIndexQueue
from tessera.memory.adapters.minilm import MiniLmEmbedder
from tessera.memory.adapters.questions import CachedQueryEmbedder
from tessera.memory.adapters.recall import PostgresMemoryStore
from tessera.memory.adapters.tenants import PostgresTenants
from tessera.memory.handlers import Handlers
from tessera.memory.workers import IndexWorker, LexicalStage, VectorStage
from tessera.resilience import Breaker
from tessera.storage import Database
from tessera.testkit import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

GROUP = "memory.ingestion"
START = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE = timedelta(seconds=60)


class Listener:
    """Hears what is answered."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    async def reply(self, data: EventData) -> None:
        self.heard.append(data)

    async def settle(self) -> None:
        pass


class Ends:
    """The log's ends, as a test says."""

    def __init__(self) -> None:
        self.ends: dict[tuple[str, int], int] = {}

    async def of(self, topics: Sequence[str], *, not_older_than: timedelta = timedelta(0)) -> dict[tuple[str, int], int]:
        return self.ends


class World:
    """One tenant, whose events come on partition 0 of its own topic."""

    def __init__(self, tenant: str, database: Database, handlers: Handlers, ends: Ends) -> None:
        self.tenant, self.database, self.handlers, self.ends = tenant, database, handlers, ends
        self.topic = f"ingest.{tenant}"
        self.position = 0
        self._row = PositionRow(GROUP, self.topic, 0)

    async def begin(self) -> None:
        async with self.database.transaction() as connection:
            await self._row.begin(connection, 0)

    def write(self, name: str, body: str | None = None) -> AwaitedWrite:
        """What a token names. The place is that of the event that is applied next."""
        place = LogPlace(topic=self.topic, partition=0, offset=self.position)
        identity, digest = identity_digest(self.tenant, "/test", name), body_digest((body or name).encode())
        return AwaitedWrite(identity=identity.hex(), body=digest.hex(), place=place)

    async def apply(self, name: str) -> None:
        """One event, as the bus applies it: inbox, state, outbox and position in one transaction."""
        data = MessagePublished(conversation_id="c", role="user", content=f"The word is {name}.", occurred_at=START)
        event = self._received(data, name)
        async with self.database.transaction() as connection:
            await enter(connection, GROUP, [InboxItem(self.tenant, event.digest, body_digest(name.encode()))])
            rows: list[OutboxRow] = []
            await self.handlers.message_published(event, PostgresUnit(Transaction(connection, event.origin, "memory", rows)))
            await outbox.write(connection, rows)
            await self._row.advance(connection, self.position, self.position + 1)
        self.position += 1

    async def pass_over(self, name: str, state: str) -> None:
        """One event that comes and is not applied."""
        kept = state in ("waiting", "stuck")
        values = {"group": GROUP, "topic": self.topic, "offset": self.position, "tenant": self.tenant, "state": state}
        content = {"headers": "[]", "value": b"", "milliseconds": 1} if kept else {"headers": None, "value": None, "milliseconds": None}
        async with self.database.transaction() as connection:
            await connection.execute(PARK, {**values, **content, "identity": identity_digest(self.tenant, "/test", name)})
            await self._row.advance(connection, self.position, self.position + 1)
        self.position += 1

    async def index(self, *, vectors: bool = True) -> None:
        queue = PostgresIndexQueue(self.database)
        while await LexicalStage()(queue, 8):
            pass
        while vectors and await VectorStage(self.handlers.embedder)(queue, 8):
            pass

    async def ask(self, consistency: ReadConsistency, query: str = "word") -> RecallCompleted:
        """The answer, once there is one."""
        listener = Listener()
        asked = RecallRequested(reply_partition=0, query=query, limit=100, consistency=consistency)
        await self.handlers.recall_requested(self._received(asked, "question"), listener)  # type: ignore[arg-type]
        await eventually(lambda: listener.heard, timeout=PATIENCE)
        (answer,) = listener.heard
        return answer

    async def standing(self, *names: str, wait: float = 0.0, stage: Any = "words") -> tuple[str, str | None]:
        """What is said of these events, and why."""
        writes = tuple(self.write(name).model_copy(update={"place": None}) for name in names)
        freshness = (await self.ask(ReadConsistency(level="read_your_writes", writes=writes, wait_seconds=wait, stage=stage))).freshness
        assert freshness is not None
        return freshness.standing, freshness.reason.code if freshness.reason else None

    def _received(self, data: EventData, name: str) -> Received[Any]:
        return Received(
            data=data,
            id=name,
            source="/test",
            type=data.event_type,
            time=START,
            tenant_id=self.tenant,
            subject_id=None,
            request_id=None,
            deadline=None,
            traceparent=None,
            sequence=None,
            correlation_id=None,
            key=None,
            topic=self.topic,
            partition=0,
            offset=self.position,
            digest=identity_digest(self.tenant, "/test", name),
        )


PARK = text("""
    INSERT INTO parked (consumer, topic, partition, "offset", tenant_id, identity, state, code, message, headers, value,
        record_milliseconds)
    VALUES (:group, :topic, 0, :offset, :tenant, :identity, :state, 'data_invalid', 'why', CAST(:headers AS jsonb), :value, :milliseconds)
""")
REINDEX = text("""
    INSERT INTO index_task (tenant_id, memory_id, stage, neighbours) SELECT tenant_id, id, 'lexical', false FROM memory
    WHERE tenant_id = :tenant
""")


@pytest.fixture
async def world(database: Database, embedder: MiniLmEmbedder, tenant: str) -> AsyncIterator[World]:
    tenants = PostgresTenants(database)
    await tenants.put(TenantChanged(tenant=tenant, state="active", changed_at=START))
    queries = CachedQueryEmbedder(embedder, Breaker("embedder"), None, timedelta(seconds=30))
    ends = Ends()
    made = World(tenant, database, Handlers(tenants, PostgresMemoryStore(database), embedder, queries, ends), ends)
    await made.begin()
    yield made
    async with database.transaction() as connection:
        await connection.execute(text("DELETE FROM index_task WHERE tenant_id = :tenant"), {"tenant": tenant})


async def test_no_reader_is_answered_before_its_write_can_be_found_in_the_same_snapshot(world: World) -> None:
    """Writer, indexer and readers at once; every reader looks as often as it can."""
    names = [f"word{number:03}" for number in range(40)]
    writes = {name: world.write(name).model_copy(update={"place": None}) for name in names}
    stopping = asyncio.Event()
    worker = IndexWorker("lexical", PostgresIndexQueue(world.database), LexicalStage(), 8, timedelta(milliseconds=1))
    indexing = asyncio.create_task(worker.run(stopping))

    async def write_all() -> None:
        for name in names:
            await world.apply(name)

    async def read(name: str) -> int:
        looks, wanted = 0, ReadConsistency(level="read_your_writes", writes=(writes[name],))
        while (answer := await world.ask(wanted, query=name)).freshness.standing == "behind":  # type: ignore[union-attr]
            assert answer.memories == ()
            looks += 1
        assert name in [memory.origin_id for memory in answer.memories]
        return looks

    looks, _ = await asyncio.gather(asyncio.gather(*map(read, names)), write_all())
    stopping.set()
    await indexing
    assert sum(looks) > len(names)  # else nobody raced anybody


async def test_a_waiting_reader_is_woken_by_the_commit_and_not_by_its_clock(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.bus.waiting.FIRST_PAUSE_SECONDS", 3_600.0)
    monkeypatch.setattr("tessera.bus.waiting.LONGEST_PAUSE_SECONDS", 3_600.0)
    stopping = asyncio.Event()
    listening = asyncio.create_task(Announcements(world.database, progressed=world.handlers.room.changed).run(stopping))
    try:
        wanted = ReadConsistency(level="read_your_writes", writes=(world.write("late"),), wait_seconds=300)
        reading = asyncio.create_task(world.ask(wanted))
        await eventually(lambda: len(world.handlers.room) == 1)
        await world.apply("late")
        await world.index(vectors=False)
        answer = await asyncio.wait_for(reading, 30)
        assert [memory.origin_id for memory in answer.memories] == ["late"]
    finally:
        stopping.set()
        await listening


async def test_words_come_first_and_vectors_are_waited_for_only_where_asked(world: World) -> None:
    await world.apply("staged")
    assert await world.standing("staged", stage=None) == ("satisfied", None)
    assert await world.standing("staged") == ("behind", None)
    await world.index(vectors=False)
    assert await world.standing("staged") == ("satisfied", None)
    assert await world.standing("staged", stage="vectors") == ("behind", None)
    await world.index()
    assert await world.standing("staged", stage="vectors") == ("satisfied", None)


async def test_a_memory_that_is_only_indexed_anew_does_not_make_its_token_wait(world: World) -> None:
    await world.apply("first")
    await world.index()
    async with world.database.transaction() as connection:
        await connection.execute(REINDEX, {"tenant": world.tenant})
    assert await world.standing("first", stage="vectors") == ("satisfied", None)


@pytest.mark.parametrize(
    ("state", "standing"),
    [("refused", "refused"), ("dead", "refused"), ("waiting", "pending"), ("stuck", "pending"), ("delayed", "pending")],
)
async def test_what_was_not_applied_is_told_with_the_reason(world: World, state: str, standing: str) -> None:
    await world.apply("good")
    await world.pass_over("bad", state)
    await world.index()
    assert await world.standing("bad") == (standing, "data_invalid")
    assert await world.standing("good") == ("satisfied", None)
    assert await world.standing("good", "bad") == (standing, "data_invalid")


async def test_ends_wait_for_everything_below_and_answers_can_be_read_again(world: World) -> None:
    await world.apply("one")
    await world.index()
    world.ends.ends = {(world.topic, 0): 2}
    strong = ReadConsistency(level="strong")
    assert (await world.ask(strong)).freshness.standing == "behind"  # type: ignore[union-attr]
    await world.pass_over("parked", "waiting")
    answer = await world.ask(ReadConsistency(level="eventual"))
    assert answer.freshness is not None
    assert (await world.ask(strong)).freshness.standing == "pending"  # type: ignore[union-attr]
    assert answer.freshness.ends == (LogEnd(topic=world.topic, partition=0, next_offset=1),)
    again = ReadConsistency(level="read_your_writes", ends=answer.freshness.ends)
    assert (await world.ask(again)).freshness.standing == "satisfied"  # type: ignore[union-attr]


async def test_what_others_go_on_writing_is_not_waited_for(world: World) -> None:
    await world.apply("mine")
    world.ends.ends = {(world.topic, 0): 1}
    reading = asyncio.create_task(world.ask(ReadConsistency(level="strong", wait_seconds=60)))
    await eventually(lambda: len(world.handlers.room) == 1)
    queue = PostgresIndexQueue(world.database)
    for number in range(5):
        await world.apply(f"other{number}")
        await LexicalStage()(queue, 1)
    answer = await asyncio.wait_for(reading, 30)
    assert "mine" in [memory.origin_id for memory in answer.memories]


async def test_a_reader_that_may_not_wait_longer_is_told_how_far_it_is(world: World) -> None:
    assert await world.standing("never", wait=0.2) == ("behind", None)
    await eventually(lambda: len(world.handlers.room) == 0)


async def test_freshness_alone_can_be_asked_for(world: World) -> None:
    listener = Listener()
    await world.apply("asked")
    await world.index()
    asked = FreshnessInspected(reply_partition=0, consistency=ReadConsistency(level="read_your_writes", writes=(world.write("asked"),)))
    await world.handlers.freshness_inspected(world._received(asked, "question"), listener)  # type: ignore[arg-type]
    (report,) = listener.heard
    assert (report.freshness.standing, report.freshness.searchable) == ("satisfied", "vectors")


async def test_a_tenant_sees_its_own_progress_alone(world: World) -> None:
    await world.apply("secret")
    await world.pass_over("parked", "stuck")
    identity = identity_digest(world.tenant, "/test", "secret")
    target = Target([Write(identity, body_digest(b"secret"), Position(world.topic, 0, 0))])
    async with world.database.reading(f"{world.tenant}-other") as connection:
        seen = await seen_in(connection, GROUP, world.tenant, ("ingest", world.topic), target)
    assert (seen.positions, seen.parked, seen.inbox) == ({}, [], {})
    assert judge(target, seen).standing is Standing.BEHIND


async def test_recall_without_a_demand_answers_as_before_and_says_how_far_it_was(world: World) -> None:
    await world.apply("plain")
    await world.index()
    found = await world.handlers.recall(world.tenant, "word", 10, RecallFilter())
    answer = await world.ask(ReadConsistency(level="eventual"))
    assert [memory.origin_id for memory in found.memories] == [memory.origin_id for memory in answer.memories] == ["plain"]
    assert answer.freshness is not None
    assert (answer.freshness.searchable, answer.freshness.ends[0].next_offset) == ("vectors", 1)
