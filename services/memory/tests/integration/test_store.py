"""Admission, indexing, recall and archiving on a real Postgres with the real embedder, without Kafka between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from sqlalchemy import text

from tessera.bus import Received, Transaction
from tessera.bus.outbox import OutboxRow
from tessera.contracts.base import EventData
from tessera.contracts.errors import InvalidError, Problem, RetryableError
from tessera.contracts.events import (
    ArchivedItem,
    ArchiveRequested,
    DocumentPublished,
    EmbeddingRequested,
    EntityPublished,
    EventRefused,
    GenerationRequested,
    GenerationTokenized,
    IngestionInspected,
    MemoryGrounding,
    MessagePublished,
    ModelReference,
    PromptTokens,
    RecallFilter,
    RecallRequested,
    RelationPublished,
    TenantChanged,
)
from tessera.contracts.ids import identity_digest
from tessera.memory.adapters.admission import PostgresUnit
from tessera.memory.adapters.announcements import Announcements
from tessera.memory.adapters.indexing import PostgresIndexQueue
from tessera.memory.adapters.minilm import MiniLmEmbedder
from tessera.memory.adapters.questions import CachedQueryEmbedder, GuardedEmbedder, QueryCache, cache_key
from tessera.memory.adapters.recall import PostgresMemoryStore
from tessera.memory.adapters.refusals import note_refusal
from tessera.memory.adapters.tenants import PostgresTenants
from tessera.memory.handlers import Handlers, Recollection
from tessera.memory.ports import Embedded
from tessera.memory.workers import IndexWorker, LexicalStage, VectorStage
from tessera.resilience import Breaker
from tessera.storage import Database
from tessera.testkit import Stack, eventually
from tessera.testkit.databases import PostgresDatabase

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

START = datetime(2026, 1, 1, tzinfo=UTC)


class Listener:
    """Hears what a handler answers."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    async def reply(self, data: EventData) -> None:
        self.heard.append(data)

    async def publish(self, data: EventData, **_addressed: Any) -> None:
        self.heard.append(data)


class EmptyLog:
    """A log in which nothing is, so that nothing has to be waited for."""

    async def of(self, topics: Sequence[str], *, not_older_than: timedelta = timedelta(0)) -> dict[tuple[str, int], int]:
        return {}


class BrokenEmbedder:
    """An embedder whose runtime fails."""

    model_id = "all-MiniLM-L6-v2"

    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        raise RetryableError(f"cannot embed {len(texts)} texts")


@dataclass
class World:
    """One tenant's memory, driven by events."""

    tenant: str
    database: Database
    handlers: Handlers
    embedder: MiniLmEmbedder
    published: list[OutboxRow] = field(default_factory=list)

    async def tell(self, data: EventData, event_id: str, **more: Any) -> None:
        """Hands an event to its handler within one transaction, as the bus does."""
        event = received(data, event_id, more.pop("tenant", self.tenant), **more)
        handler = getattr(self.handlers, data.event_type.split(".", 1)[1].rsplit(".", 1)[0].replace(".", "_"))
        rows: list[OutboxRow] = []
        async with self.database.transaction() as connection:
            await handler(event, PostgresUnit(Transaction(connection, event.origin, "memory", rows)))
        self.published += rows

    async def ask(self, data: EventData) -> Any:
        """Hands a question to its handler and gives back the answer."""
        listener = Listener()
        name = data.event_type.split(".", 1)[1].rsplit(".", 1)[0].replace(".", "_")
        await getattr(self.handlers, name)(received(data, "question", self.tenant), listener)
        (answer,) = listener.heard
        return answer

    async def say(self, words: str, event_id: str, minute: int = 0, **more: Any) -> None:
        said = MessagePublished(conversation_id="c", role="user", content=words, occurred_at=START + timedelta(minutes=minute), **more)
        await self.tell(said, event_id)

    async def index(self, *, vectors: bool = True) -> None:
        """Does all index work that is due."""
        queue = PostgresIndexQueue(self.database)
        while await LexicalStage()(queue, 8):
            pass
        stage = VectorStage(self.embedder)
        while vectors and await stage(queue, 8):
            pass

    async def indexed(self, count: int) -> None:
        """Waits until this many memories are in both indexes."""

        async def all_there() -> bool:
            return len(await self.rows("SELECT 1 FROM memory_vec JOIN memory_lex USING (tenant_id, id) WHERE tenant_id = :tenant")) == count

        await eventually(all_there, timeout=30)

    async def recall(self, query: str, limit: int = 10, tenant: str | None = None, **wanted: Any) -> Recollection:
        return await self.handlers.recall(tenant or self.tenant, query, limit, RecallFilter(**wanted))

    async def found(self, query: str, **more: Any) -> list[str]:
        return [memory.origin_id for memory in (await self.recall(query, **more)).memories]

    async def rows(self, statement: str) -> list[Any]:
        """What the worker role sees of this tenant."""
        async with self.database.transaction() as connection:
            return list(await connection.execute(text(statement), {"tenant": self.tenant}))

    def types(self) -> list[str]:
        return [dict(row.encoded.headers)["ce_type"].decode() for row in self.published]


def received(data: EventData, event_id: str, tenant: str, sequence: int | None = None) -> Received[Any]:
    return Received(
        data=data,
        id=event_id,
        source="/test",
        type=data.event_type,
        time=START,
        tenant_id=tenant,
        subject_id=None,
        request_id=None,
        deadline=None,
        traceparent=None,
        sequence=sequence,
        correlation_id=None,
        key=None,
        topic="ingest",
        partition=0,
        offset=0,
        digest=identity_digest(tenant, "/test", event_id),
    )


@pytest.fixture
async def world(database: Database, embedder: MiniLmEmbedder, tenant: str) -> AsyncIterator[World]:
    tenants = PostgresTenants(database)
    await tenants.put(TenantChanged(tenant=tenant, state="active", changed_at=START))
    queries = CachedQueryEmbedder(embedder, Breaker("embedder"), None, timedelta(seconds=30))
    handlers = Handlers(tenants, PostgresMemoryStore(database), embedder, queries, EmptyLog())
    yield World(tenant, database, handlers, embedder)
    async with database.transaction() as connection:
        await connection.execute(text("DELETE FROM index_task WHERE tenant_id = :tenant"), {"tenant": tenant})


async def test_a_second_tenant_sees_nothing_in_any_table(world: World, postgres: PostgresDatabase) -> None:
    await world.tell(EntityPublished(entity_id="ada", name="Ada", kind="person"), "entity")
    await world.tell(RelationPublished(source_entity_id="ada", relation="knows", target_entity_id="bob"), "relation")
    await world.say("Ada sings.", "message")
    await world.index()
    async with world.database.transaction() as connection:
        await note_refusal(world.tenant, refused("refused"), connection)
    names = ("memory", "memory_vec", "memory_lex", "lexical_size", "lexical_term", "entity", "mention", "relation", "refusal")

    async with world.database.reading(world.tenant) as connection:
        own = {name: await connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in names}
    async with world.database.reading(f"{world.tenant}-other") as connection:
        foreign = {name: await connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in names}

    assert all(own.values()), own
    assert not any(foreign.values()), foreign
    assert await world.found("Who sings?", tenant=f"{world.tenant}-other") == []


async def test_every_table_forces_row_level_security(postgres: PostgresDatabase) -> None:
    connection = await asyncpg.connect(postgres.admin_url)
    try:
        rows = await connection.fetch(
            "SELECT relname, relrowsecurity AND relforcerowsecurity AS forced FROM pg_class"
            " WHERE relnamespace = 'memory'::regnamespace AND relkind = 'r' AND relname <> 'alembic_version'"
        )
    finally:
        await connection.close()

    assert len(rows) >= 12
    assert {row["relname"] for row in rows if not row["forced"]} == set()


async def test_repeating_an_event_adds_nothing(world: World) -> None:
    for _ in range(2):
        await world.say("Only once.", "once")
        await world.index()

    assert len(await world.rows("SELECT 1 FROM memory WHERE tenant_id = :tenant")) == 1
    assert world.types() == ["tessera.memory.recorded.v1"]
    assert [row.memories for row in await world.rows("SELECT memories FROM lexical_size WHERE tenant_id = :tenant")] == [1]


async def test_both_indexes_are_the_same_whatever_the_order_of_arrival(world: World) -> None:
    words = ["The concert was on Friday.", "Nina played the cello.", "Then we ate soup.", "It was late."]
    for order, conversation in (((0, 1, 2, 3), "forward"), ((3, 1, 0, 2), "shuffled")):
        for minute in order:
            said = MessagePublished(
                conversation_id=conversation, role="user", content=words[minute], occurred_at=START + timedelta(minutes=minute)
            )
            await world.tell(said, f"{conversation}-{minute}")
            await world.index()

    entries = await world.rows(
        "SELECT m.conversation_id, m.occurred_at, CAST(l.alone AS text) AS la, CAST(l.context AS text) AS lc, CAST(v.context AS text) AS vc"
        " FROM memory m JOIN memory_lex l USING (tenant_id, id) JOIN memory_vec v USING (tenant_id, id)"
        " WHERE tenant_id = :tenant ORDER BY m.conversation_id, m.occurred_at"
    )
    forward, shuffled = ([tuple(row)[1:4] for row in entries if row.conversation_id == name] for name in ("forward", "shuffled"))
    assert len(forward) == 4
    assert forward == shuffled


async def test_statistics_are_exactly_what_the_entries_hold(world: World) -> None:
    for minute, words in enumerate(["red kite", "red fox", "red red fox", "blue whale"]):
        await world.say(words, f"m{minute}", minute)
    await world.index()
    archived = (await world.rows("SELECT id, version FROM memory WHERE tenant_id = :tenant ORDER BY occurred_at"))[1]
    await world.tell(ArchiveRequested(sweep_id="s", items=(ArchivedItem(memory_id=str(archived.id), version=archived.version),)), "archive")
    await world.index()

    counted = {
        (row.term, view): getattr(row, view)
        for row in await world.rows("SELECT term, alone, context FROM lexical_term WHERE tenant_id = :tenant")
        for view in ("alone", "context")
    }
    held: dict[tuple[int, str], int] = {}
    for row in await world.rows(
        "SELECT CAST(alone AS text) AS alone, CAST(context AS text) AS context FROM memory_lex WHERE tenant_id = :tenant"
    ):
        for view in ("alone", "context"):
            sparse = getattr(row, view)
            for pair in sparse[1 : sparse.index("}")].split(","):
                key = (int(pair.split(":")[0]), view)
                held[key] = held.get(key, 0) + 1
    assert {key: count for key, count in counted.items() if count} == held
    assert [row.memories for row in await world.rows("SELECT memories FROM lexical_size WHERE tenant_id = :tenant")] == [3]


async def test_archived_words_leave_the_context_of_what_came_next(world: World) -> None:
    await world.say("The password is xylophone.", "secret", 0)
    await world.say("Thank you.", "thanks", 1)
    await world.index()
    before = await world.recall("xylophone")
    (secret,) = await world.rows("SELECT id FROM memory WHERE tenant_id = :tenant AND origin_id = 'secret'")

    await world.tell(ArchiveRequested(sweep_id="s", items=(ArchivedItem(memory_id=str(secret.id), version=1),)), "archive")
    await world.index()
    after = await world.recall("xylophone")

    assert [(memory.origin_id, memory.scores.lexical_score is not None) for memory in before.memories] == [
        ("secret", True),
        ("thanks", True),
    ]
    assert [(memory.origin_id, memory.scores.lexical_score) for memory in after.memories] == [("thanks", None)]
    assert world.types()[-1] == "tessera.memory.changed.v1"


async def test_a_repeated_request_to_archive_is_skipped_and_unknown_ones_are_named(world: World) -> None:
    await world.say("Once.", "m")
    (row,) = await world.rows("SELECT id FROM memory WHERE tenant_id = :tenant")
    request = ArchiveRequested(
        sweep_id="s",
        items=(ArchivedItem(memory_id=str(row.id), version=1), ArchivedItem(memory_id="00000000-0000-7000-8000-000000000000", version=1)),
    )

    await world.tell(request, "first")
    await world.tell(request, "second")

    changes = [_data(row) for row in world.published if b"memory.changed" in dict(row.encoded.headers)["ce_type"]]
    assert [(change["change"], change.get("reason")) for change in changes] == [
        ("archived", None),
        ("archive_skipped", "unknown"),
        ("archive_skipped", "already_archived"),
        ("archive_skipped", "unknown"),
    ]
    with pytest.raises(InvalidError, match="UUID"):
        await world.tell(ArchiveRequested(sweep_id="s", items=(ArchivedItem(memory_id="x", version=1),)), "third")


async def test_a_new_edition_replaces_a_document_and_an_entity(world: World) -> None:
    await world.tell(DocumentPublished(document_id="d", content="The tower is 80 metres high."), "old")
    await world.tell(DocumentPublished(document_id="d", content="The tower is 90 metres high."), "new")
    await world.tell(EntityPublished(entity_id="t", name="Tower", kind="place"), "old-entity")
    await world.tell(EntityPublished(entity_id="t", name="Great Tower", kind="place"), "new-entity")
    await world.index()

    assert sorted(await world.found("How high is the tower?")) == ["new", "new-entity"]
    assert [row.name for row in await world.rows("SELECT name FROM entity WHERE tenant_id = :tenant")] == ["Great Tower"]


async def test_mentions_are_noted_whichever_comes_first(world: World) -> None:
    await world.say("I saw Ada Byron and the Countess.", "before")
    await world.say("Nobody was there, Adabyron neither.", "nobody")
    await world.tell(EntityPublished(entity_id="ada", name="Ada Byron", kind="person", aliases=("Countess",)), "entity")
    await world.say("ada byron left.", "after")

    rows = await world.rows(
        "SELECT m.origin_id FROM mention JOIN memory m ON m.tenant_id = mention.tenant_id AND m.id = mention.memory_id"
        " WHERE mention.tenant_id = :tenant AND mention.entity_id = 'ada'"
    )
    assert {row.origin_id for row in rows} == {"before", "entity", "after"}


async def test_filters_limit_what_is_searched(world: World) -> None:
    await world.say("A lighthouse in a conversation.", "message")
    await world.tell(DocumentPublished(document_id="d", title="Coast", content="A lighthouse in a document."), "chunk")
    await world.index()

    assert sorted(await world.found("lighthouse")) == ["chunk", "message"]
    assert await world.found("lighthouse", kinds=("chunk",)) == ["chunk"]
    assert await world.found("lighthouse", conversation_id="c") == ["message"]
    assert await world.found("lighthouse", document_id="d") == ["chunk"]
    assert await world.found("lighthouse", conversation_id="elsewhere") == []
    assert len(await world.found("lighthouse", limit=1)) == 1


async def test_without_the_embedder_recall_is_lexical_and_says_so(world: World) -> None:
    await world.say("The submarine is yellow.", "match")
    await world.say("Something else.", "other", 5)
    await world.index()
    broken = CachedQueryEmbedder(BrokenEmbedder(), breaker := Breaker("embedder", failure_threshold=1), None, timedelta(seconds=1))
    handlers = replace(world.handlers, queries=broken)

    first, second = [await handlers.recall(world.tenant, "submarine", 10, RecallFilter()) for _ in range(2)]

    assert breaker.state == "open"
    for found in (first, second):
        assert found.degraded == ("embedder",)
        assert found.memories[0].origin_id == "match"
        assert found.memories[0].scores.vector_similarity is None
    assert (await world.recall("submarine")).degraded == ()


async def test_an_embedder_that_is_too_slow_opens_its_breaker_and_recovers(world: World) -> None:
    await world.say("The submarine is yellow.", "match")
    await world.index()
    breaker = Breaker("embedder", failure_threshold=2, reset_after=timedelta(milliseconds=100))
    queries = CachedQueryEmbedder(world.embedder, breaker, None, timedelta(microseconds=1))

    assert [await queries.vector(world.tenant, f"submarine {number}") for number in range(2)] == [None, None]
    assert breaker.state in ("open", "half_open")
    queries.wait_for(timedelta(seconds=60))
    vector = await eventually(lambda: queries.vector(world.tenant, "submarine"))

    assert vector is not None
    assert breaker.state == "closed"


async def test_vectors_wait_for_the_embedder_and_nothing_is_lost(world: World) -> None:
    await world.say("Found by its words at once.", "m")
    queue = PostgresIndexQueue(world.database)
    await world.index(vectors=False)

    with pytest.raises(RetryableError):
        await VectorStage(GuardedEmbedder(BrokenEmbedder(), Breaker("embedder")))(queue, 8)
    lexical_only = await world.recall("words")
    await world.index()
    complete = await world.recall("words")

    assert lexical_only.memories[0].scores.vector_similarity is None
    assert complete.memories[0].scores.vector_similarity is not None


async def test_an_ingested_event_is_applied_then_searchable(world: World) -> None:
    async def state() -> tuple[bool, bool, bool]:
        async with world.handlers.store.snapshot(world.tenant) as snapshot:
            known = await snapshot.ingestion("m")
        return bool(known.memory_ids), known.pending, known.refusal is not None

    assert await state() == (False, False, False)
    async with world.database.transaction() as connection:
        await note_refusal(world.tenant, refused("m"), connection)
        await note_refusal(world.tenant, refused("m"), connection)
        await note_refusal(world.tenant, refused(""), connection)
    assert await state() == (False, False, True)
    await world.say("Now it is right.", "m")
    assert await state() == (True, True, False)
    await world.index()
    assert await state() == (True, False, False)


async def test_questions_are_answered(world: World) -> None:
    await world.say("The parrot is called Iago.", "m")
    await world.index()
    model = ModelReference(model_id="m", provider="p", capability="chat", encoding="o200k_base", template="plain", exact=True)
    plain = GenerationRequested(generation_id="g", model=model, prompt="What is the parrot called?", reply_partition=0)
    grounded = plain.model_copy(update={"memory": MemoryGrounding()})
    prompt = PromptTokens(count=1, source="counted")

    recalled = await world.ask(RecallRequested(query="parrot", reply_partition=0))
    reported = await world.ask(IngestionInspected(event_id="m", reply_partition=0))
    unknown = await world.ask(IngestionInspected(event_id="never", reply_partition=0))
    embedded = await world.ask(EmbeddingRequested(model="all-MiniLM-L6-v2", inputs=("parrot",), reply_partition=0))
    not_asked = await world.ask(GenerationTokenized(request=plain, prompt=prompt))
    ready = await world.ask(GenerationTokenized(request=grounded, prompt=prompt))

    assert [memory.origin_id for memory in recalled.memories] == ["m"]
    assert (reported.state, unknown.state) == ("searchable", "unknown")
    assert (len(embedded.vectors[0]), embedded.token_counts) == (384, (3,))
    assert (not_asked.recall, not_asked.memories) == ("not_asked", ())
    assert (ready.recall, [memory.origin_id for memory in ready.memories]) == ("complete", ["m"])
    with pytest.raises(InvalidError) as refusal:
        await world.ask(EmbeddingRequested(model="other", inputs=("x",), reply_partition=0))
    assert refusal.value.code == "model_not_found"


async def test_tenants_must_be_known_and_active(world: World) -> None:
    with pytest.raises(InvalidError) as unknown:
        await world.tell(MessagePublished(conversation_id="c", role="user", content="x"), "m", tenant=f"{world.tenant}-unknown")
    tenants = PostgresTenants(world.database)
    await tenants.put(TenantChanged(tenant=world.tenant, state="suspended", changed_at=START + timedelta(hours=1)))
    await tenants.put(TenantChanged(tenant=world.tenant, state="active", changed_at=START))
    with pytest.raises(InvalidError) as suspended:
        await world.say("x", "m")

    assert (unknown.value.code, suspended.value.code) == ("tenant_unknown", "tenant_suspended")


async def test_announced_work_is_done_without_polling(world: World) -> None:
    queue = PostgresIndexQueue(world.database)
    workers = [
        IndexWorker("lexical", queue, LexicalStage(), 8, timedelta(minutes=5)),
        IndexWorker("vector", queue, VectorStage(GuardedEmbedder(world.embedder, Breaker("embedder"))), 8, timedelta(minutes=5)),
    ]
    announcements = Announcements(world.database, *(worker.announced for worker in workers))
    stopping = asyncio.Event()
    tasks = [asyncio.create_task(run(stopping)) for run in (announcements.run, *(worker.run for worker in workers))]
    try:
        await world.say("First.", "first")
        await world.indexed(1)
        await world.say("Second.", "second", 1)
        await world.indexed(2)
    finally:
        stopping.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 20)


async def test_questions_are_cached_and_losing_redis_changes_nothing(world: World, stack: Stack) -> None:
    redis = Redis.from_url(stack.redis_url)
    cache = QueryCache(redis, Breaker("redis"), timedelta(minutes=1))
    cached = CachedQueryEmbedder(world.embedder, Breaker("embedder"), cache, timedelta(seconds=30))
    nowhere = Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    gone = QueryCache(nowhere, Breaker("redis", failure_threshold=1), timedelta(minutes=1))
    uncached = CachedQueryEmbedder(world.embedder, Breaker("embedder"), gone, timedelta(seconds=30))
    try:
        first = await cached.vector(world.tenant, "a question")
        kept = await cache.get(cache_key(world.tenant, world.embedder.model_id, "a question"))
        again = await CachedQueryEmbedder(BrokenEmbedder(), Breaker("embedder"), cache, timedelta(seconds=1)).vector(
            world.tenant, "a question"
        )
        without = [await uncached.vector(world.tenant, "a question") for _ in range(2)]
    finally:
        await redis.aclose()
        await nowhere.aclose()

    assert first == kept == again
    assert without == [first, first]
    assert cache_key("a", "m", "q") != cache_key("b", "m", "q")


def refused(event_id: str) -> EventRefused:
    return EventRefused(
        refused_id=event_id,
        refused_source="/test",
        refused_type="type",
        reason=Problem(code="data_invalid", message="wrong", param="content"),
        topic="ingest",
        partition=0,
        offset=0,
    )


def _data(row: OutboxRow) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(row.encoded.value)
    return data
