"""The service as a process, on a real Kafka: from a producer's event to an answer, spoken by clients that are not ours."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts.base import EventData
from tessera.contracts.events import (
    ArchivedItem,
    ArchiveRequested,
    ChatMessage,
    DocumentPublished,
    EmbeddingCompleted,
    EmbeddingRequested,
    EntityPublished,
    EventRefused,
    GenerationReady,
    GenerationRequested,
    GenerationTokenized,
    IngestionInspected,
    IngestionReported,
    MemoryChanged,
    MemoryGrounding,
    MemoryRecorded,
    MessagePublished,
    ModelReference,
    PromptTokens,
    RecallCompleted,
    RecallRequested,
    RelationPublished,
    TenantChanged,
)
from tessera.testkit import CloudEvent, CloudEventProducer, CloudEventReader, ServiceProcess, Stack, eventually, unique_kafka_prefix
from tessera.testkit.databases import PostgresDatabase

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PATIENCE = timedelta(seconds=60)


class Conversation:
    """What a test says to the service, and what it hears."""

    def __init__(self, stack: Stack, prefix: str) -> None:
        self._stack, self._prefix = stack, prefix
        self.producer = CloudEventProducer(stack.kafka_bootstrap_servers, prefix)
        self.readers: dict[str, CloudEventReader] = {}

    async def tell(self, topic: str, data: EventData | dict[str, Any] | bytes, tenant: str, **attributes: Any) -> str:
        """Publishes and gives back the event's id."""
        identifier = attributes.pop("id", None) or str(uuid4())
        await self.producer.publish(topic, data, id=identifier, tenantid=tenant, **attributes)
        return str(identifier)

    async def declare(self, tenant: str, state: str = "active") -> None:
        changed = TenantChanged(tenant=tenant, state=state, changed_at=datetime.now(UTC))
        await self.producer.publish("tenant.changed", changed, key=tenant.encode(), tenantid=tenant)

    def reader(self, topic: str) -> CloudEventReader:
        if topic not in self.readers:
            self.readers[topic] = CloudEventReader(self._stack.kafka_bootstrap_servers, topic, topic_prefix=self._prefix)
        return self.readers[topic]

    async def heard(self, topic: str, tenant: str, event: type[EventData], count: int = 1) -> list[CloudEvent]:
        """The first `count` events of a type and tenant."""

        def mine(seen: Any) -> list[CloudEvent]:
            return [one for one in seen if one.attributes.get("tenantid") == tenant and one.type == event.event_type]

        seen = await self.reader(topic).until(lambda events: len(mine(events)) >= count, PATIENCE)
        return mine(seen)

    async def ask(self, topic: str, data: EventData, tenant: str) -> CloudEvent:
        """Asks, and waits for the answer to exactly this question."""
        identifier = await self.tell(topic, data, tenant)
        seen = await self.reader("reply").until(
            lambda events: any(one.attributes.get("correlationid") == identifier for one in events), PATIENCE
        )
        return next(one for one in seen if one.attributes.get("correlationid") == identifier)

    async def searchable(self, event_id: str, tenant: str) -> IngestionReported:
        """Asks after an ingested event until it can be found."""
        for _ in range(300):
            answer = await self.ask("ingestion.inspected", IngestionInspected(event_id=event_id, reply_partition=0), tenant)
            report = IngestionReported.model_validate(answer.data)
            if report.state in {"searchable", "refused"}:
                return report
        raise AssertionError(f"{event_id} is not searchable: {report}")

    async def recall(self, query: str, tenant: str, **wanted: Any) -> RecallCompleted:
        answer = await self.ask("recall.requested", RecallRequested(query=query, reply_partition=0, **wanted), tenant)
        return RecallCompleted.model_validate(answer.data)

    async def close(self) -> None:
        for reader in self.readers.values():
            await reader.close()


def message(text: str, conversation: str = "c", **more: Any) -> MessagePublished:
    return MessagePublished(conversation_id=conversation, role="user", content=text, **more)


@pytest.fixture(scope="module")
def prefix(stack: Stack) -> str:
    """Topics of this module alone."""
    prefix = unique_kafka_prefix()
    kafka = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=prefix, keyed_partitions=4)
    asyncio.run(ensure_all(kafka))
    return prefix


@pytest.fixture(scope="module")
def service(stack: Stack, postgres: PostgresDatabase, prefix: str) -> Iterator[ServiceProcess]:
    """One process for the module; tests keep apart by tenant."""
    process = ServiceProcess("memory", stack, postgres, prefix, {})
    process.start()
    process.wait_ready()
    yield process
    process.stop()


@pytest.fixture
async def kafka(stack: Stack, service: ServiceProcess, prefix: str) -> AsyncIterator[Conversation]:
    conversation = Conversation(stack, prefix)
    yield conversation
    await conversation.close()


async def test_from_ingestion_to_recall_per_tenant(kafka: Conversation, tenant: str) -> None:
    other = f"{tenant}-other"
    await kafka.declare(tenant)
    await kafka.declare(other)
    told = await kafka.tell("ingest", message("The spare key is under the blue flowerpot.", speaker="Maria"), tenant)
    await kafka.tell("ingest", message("It rained all day in Lisbon."), tenant)
    recorded = await kafka.heard("memory.recorded", tenant, MemoryRecorded, 2)
    report = await kafka.searchable(told, tenant)

    found = await kafka.recall("Where did Maria put the key for the door?", tenant)
    foreign = await kafka.recall("Where did Maria put the key for the door?", other)

    assert report.memory_ids == tuple(event.data["memory_id"] for event in recorded if event.data["origin_id"] == told)
    assert found.memories[0].origin_id == told
    assert found.degraded == ()
    scores = found.memories[0].scores
    assert scores.total == pytest.approx(scores.vector + scores.lexical + scores.importance + scores.recency)
    assert (scores.vector_rank, scores.lexical_rank) == (1, 1)
    assert foreign.memories == ()


async def test_refusals_are_told_and_can_be_asked_for(kafka: Conversation, tenant: str) -> None:
    await kafka.declare(tenant)
    malformed = await kafka.tell("ingest", b"{", tenant, type=MessagePublished.event_type)
    misspelt = await kafka.tell(
        "ingest", {"conversation_id": "c", "role": "user", "contents": "x"}, tenant, type=MessagePublished.event_type
    )
    good = await kafka.tell("ingest", message("Good neighbours are not hurt by bad ones."), tenant)

    refused = await kafka.heard("refused", tenant, EventRefused, 2)
    reports = {event_id: await kafka.searchable(event_id, tenant) for event_id in (malformed, misspelt, good)}

    assert {event.data["refused_id"] for event in refused} == {malformed, misspelt}
    assert [reports[event_id].state for event_id in (malformed, misspelt, good)] == ["refused", "refused", "searchable"]
    reasons = [report.reason.code for report in reports.values() if report.reason is not None]
    assert reasons == ["data_malformed", "data_invalid"]


async def test_an_event_past_its_deadline_is_refused_unless_it_was_applied_before(kafka: Conversation, tenant: str) -> None:
    await kafka.declare(tenant)
    passed = "2026-01-01T00:00:00Z"
    late = await kafka.tell("ingest", message("Too late for this."), tenant, deadline=passed)
    timely = await kafka.tell("ingest", message("In good time."), tenant, deadline="2999-01-01T00:00:00Z")
    await kafka.searchable(timely, tenant)
    await kafka.tell("ingest", message("In good time."), tenant, id=timely, deadline=passed)
    last = await kafka.tell("ingest", message("The last word."), tenant)
    await kafka.searchable(last, tenant)
    (told,) = await kafka.heard("refused", tenant, EventRefused)
    reports = [await kafka.searchable(event_id, tenant) for event_id in (late, timely)]

    assert (told.data["refused_id"], told.data["reason"]["code"]) == (late, "expired")
    assert [report.state for report in reports] == ["refused", "searchable"]


async def test_unknown_and_suspended_tenants_are_refused(kafka: Conversation, tenant: str) -> None:
    suspended = f"{tenant}-suspended"
    await kafka.declare(suspended, "suspended")
    await kafka.tell("ingest", message("Nobody knows me."), tenant)
    await kafka.tell("ingest", message("I may not."), suspended)

    (told,) = await kafka.heard("refused", "unknown", EventRefused)
    (paused,) = await kafka.heard("refused", suspended, EventRefused)

    assert told.data["reason"]["code"] == "tenant_unknown"
    assert paused.data["reason"]["code"] == "tenant_suspended"


async def test_documents_entities_and_relations(kafka: Conversation, tenant: str) -> None:
    await kafka.declare(tenant)
    chapter = "The observatory opened in spring. " * 40 + "The quokka is the mascot of the library. " + "Visitors came by train. " * 40
    document = await kafka.tell("ingest", DocumentPublished(document_id="guide", title="Guide", content=chapter), tenant)
    entity = await kafka.tell(
        "ingest", EntityPublished(entity_id="ada", name="Ada Byron", kind="person", description="Mathematician."), tenant
    )
    await kafka.tell("ingest", RelationPublished(source_entity_id="ada", relation="visited", target_entity_id="library"), tenant)
    report = await kafka.searchable(document, tenant)
    await kafka.searchable(entity, tenant)
    recorded = await kafka.heard("memory.recorded", tenant, MemoryRecorded, len(report.memory_ids) + 2)

    chunk = (await kafka.recall("Which animal is the mascot?", tenant, limit=1)).memories[0]
    person = (await kafka.recall("Who is Ada Byron?", tenant, filter={"kinds": ("entity",)})).memories

    chunks = sorted((event.data for event in recorded if event.data["kind"] == "chunk"), key=lambda data: data["chunk_index"])
    assert "".join(data["text"] for data in chunks) == chapter
    assert "quokka" in str(chunk.text)
    assert [memory.entity_id for memory in person] == ["ada"]
    assert sorted({event.data["kind"] for event in recorded}) == ["chunk", "entity", "relation"]


async def test_archived_at_the_version_named_and_never_found_again(kafka: Conversation, tenant: str) -> None:
    await kafka.declare(tenant)
    first = await kafka.tell("ingest", message("The zeppelin lands at noon."), tenant)
    second = await kafka.tell("ingest", message("The zeppelin leaves at dusk."), tenant)
    reports = [await kafka.searchable(event_id, tenant) for event_id in (first, second)]
    ids = [report.memory_ids[0] for report in reports]
    items = (ArchivedItem(memory_id=ids[0], version=1), ArchivedItem(memory_id=ids[1], version=7))
    await kafka.tell("archive.requested", ArchiveRequested(sweep_id="sweep", items=items), tenant)

    changes = await kafka.heard("memory.changed", tenant, MemoryChanged, 2)
    found = await kafka.recall("When does the zeppelin land?", tenant)

    outcome = {event.data["memory_id"]: (event.data["change"], event.data["version"], event.data.get("reason")) for event in changes}
    assert outcome == {ids[0]: ("archived", 2, None), ids[1]: ("archive_skipped", 1, "version_changed")}
    assert [memory.memory_id for memory in found.memories] == [ids[1]]


async def test_generations_are_grounded_within_their_budget(kafka: Conversation, tenant: str) -> None:
    await kafka.declare(tenant)
    event_id = await kafka.tell("ingest", message("My sister's boat is called Marigold."), tenant)
    long = await kafka.tell("ingest", message("The boat of my sister. " * 200), tenant)
    await kafka.searchable(event_id, tenant)
    await kafka.searchable(long, tenant)
    model = ModelReference(
        model_id="local/quote", provider="local", capability="chat", encoding="o200k_base", template="openai-chat", exact=True
    )
    request = GenerationRequested(
        generation_id="generation",
        model=model,
        messages=(ChatMessage(role="user", content="What is my sister's boat called?"),),
        memory=MemoryGrounding(token_budget=100),
        reply_partition=0,
    )
    await kafka.tell("generation.tokenized", GenerationTokenized(request=request, prompt=PromptTokens(count=9, source="counted")), tenant)

    (event,) = await kafka.heard("generation.ready", tenant, GenerationReady)

    ready = GenerationReady.model_validate(event.data)
    assert (ready.recall, [memory.origin_id for memory in ready.memories]) == ("complete", [event_id])


async def test_embeddings(kafka: Conversation, tenant: str) -> None:
    asked = EmbeddingRequested(model="all-MiniLM-L6-v2", inputs=("one", "two words"), reply_partition=0)
    answer = await kafka.ask("embedding.requested", asked, tenant)
    unknown = await kafka.ask("embedding.requested", asked.model_copy(update={"model": "nope"}), tenant)

    completed = EmbeddingCompleted.model_validate(answer.data)
    assert [len(vector) for vector in completed.vectors] == [384, 384]
    assert completed.token_counts == (3, 4)
    assert unknown.data["problem"]["code"] == "model_not_found"


async def test_repeated_events_add_nothing(kafka: Conversation, tenant: str) -> None:
    await kafka.declare(tenant)
    event_id = await kafka.tell("ingest", message("Said once."), tenant, key=b"c")  # one after the other, in one partition
    await kafka.tell("ingest", message("Said once."), tenant, id=event_id, key=b"c")
    await kafka.tell("ingest", message("Another body."), tenant, id=event_id, key=b"c")
    last = await kafka.tell("ingest", message("The last word."), tenant, id=f"{event_id}-last", key=b"c")
    await kafka.searchable(last, tenant)

    recorded = await kafka.heard("memory.recorded", tenant, MemoryRecorded, 2)
    (refused,) = await kafka.heard("refused", tenant, EventRefused)

    assert sorted(event.data["text"] for event in recorded) == ["Said once.", "The last word."]
    assert refused.data["reason"]["code"] == "event_id_reused"


@pytest.mark.parametrize("crash_point", ["consumed_before_commit", "memory_indexed_before_commit"])
async def test_killed_with_an_event_in_hand_it_loses_and_doubles_nothing(
    kafka: Conversation, service: ServiceProcess, tenant: str, crash_point: str
) -> None:
    await kafka.declare(tenant)
    warm = await kafka.tell("ingest", message("Before."), tenant)
    await kafka.searchable(warm, tenant)
    service.stop()
    service.override(TESSERA_MEMORY__CRASH_POINT=crash_point)
    event_id = await kafka.tell("ingest", message("The event in hand."), tenant)
    service.start()
    assert await eventually(lambda: service.exit_code, timeout=90) == -signal.SIGKILL
    service.override(TESSERA_MEMORY__CRASH_POINT="")
    service.start()
    service.wait_ready()

    report = await kafka.searchable(event_id, tenant)
    recorded = await kafka.heard("memory.recorded", tenant, MemoryRecorded, 2)

    assert len(report.memory_ids) == 1
    told = {event.attributes["id"]: event.data["text"] for event in recorded}  # the relay may have died between publishing and deleting
    assert sorted(told.values()) == ["Before.", "The event in hand."]
    found = await kafka.recall("Which event was in hand?", tenant)
    assert [memory.origin_id for memory in found.memories] == [event_id, warm]
    assert crash_point != "consumed_before_commit" or redelivered(service) >= 1


def redelivered(service: ServiceProcess) -> float:
    lines = service.get_admin("/metrics")[1].splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tessera_bus_redelivered_events_total{"))


def test_health_names_every_dependency(service: ServiceProcess) -> None:
    status, body = service.get_admin("/health/ready")
    assert status == 200
    assert set(json.loads(body)["dependencies"]) == {"kafka", "postgres", "events", "embedder", "redis"}
