"""The service as a process of its own, on a real Kafka and a real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts.events import (
    GenerationFailed,
    GenerationReady,
    GenerationRequested,
    GenerationTokenized,
    MemoryRecorded,
    RequestFailed,
    TextTokenized,
    TokenizationCompleted,
    TokenizationRequested,
)
from tessera.encodings import PromptMessage, count_prompt, encoding
from tessera.local.processes import run_apart
from tessera.storage import Database
from tessera.testkit.databases import PostgresDatabase
from tessera.testkit.events import CloudEvent, CloudEventProducer, CloudEventReader, unique_kafka_prefix
from tessera.testkit.plugin import ServiceFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack
from tessera.testkit.waiting import eventually
from tessera.testkit.wire import Wire as Cable
from tessera.tokenizer.adapters.postgres import PostgresVocabulary

pytestmark = pytest.mark.integration

REPLY_PARTITION = 5
TEXT = "Grüße an 世界 👩‍👩‍👧‍👦! Zweiter Satz."
MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": TEXT}]
MODEL = {"model_id": "m", "provider": "p", "capability": "chat", "encoding": "cl100k_base", "template": "openai-chat", "exact": True}


@dataclass(frozen=True)
class Wire:
    """Kafka seen from outside: what other services would send and read."""

    stack: Stack
    prefix: str

    async def send(self, topic: str, data: Any, tenant: str, *, id: str | None = None, **attributes: str) -> str:
        identity = id or str(uuid4())
        deadline = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
        known: dict[str, Any] = {"tenantid": tenant, "requestid": f"request-{identity}", "deadline": deadline, "correlationid": identity}
        producer = CloudEventProducer(self.stack.kafka_bootstrap_servers, topic_prefix=self.prefix)
        await producer.publish(topic, data, id=identity, **(known | attributes))
        return identity

    async def answer(self, topic: str, correlation: str, count: int = 1) -> list[CloudEvent]:
        """The events on `topic` that answer the event `correlation`, once there are `count`."""
        reader = CloudEventReader(self.stack.kafka_bootstrap_servers, topic, topic_prefix=self.prefix)

        def mine(seen: Sequence[CloudEvent]) -> list[CloudEvent]:
            return [event for event in seen if event.attributes.get("correlationid") == correlation]

        try:
            return mine(await reader.until(lambda seen: len(mine(seen)) >= count))
        finally:
            await reader.close()


@pytest.fixture(scope="module")
def wire(stack: Stack) -> Wire:
    return new_wire(stack)


@pytest.fixture
def own_wire(stack: Stack) -> Wire:
    """Topics of one test alone, for tests whose service is in trouble."""
    return new_wire(stack)


def new_wire(stack: Stack) -> Wire:
    wire = Wire(stack, unique_kafka_prefix())
    run_apart(make_topics(wire))
    return wire


async def make_topics(wire: Wire) -> None:
    await ensure_all(KafkaSettings(bootstrap_servers=wire.stack.kafka_bootstrap_servers, topic_prefix=wire.prefix, keyed_partitions=4))


@pytest.fixture(scope="module")
def service(wire: Wire, postgres: PostgresDatabase) -> Iterator[ServiceProcess]:
    """One healthy process for all tests that do not harm it."""
    with ServiceProcess("tokenizer", wire.stack, postgres, wire.prefix, {}).running() as process:
        yield process


@pytest.fixture
def cable(postgres: PostgresDatabase) -> Iterator[Cable]:
    """The way to Postgres, cut at first."""
    cable = Cable(postgres.settings("tokenizer").port)
    cable.cut()
    yield cable
    cable.cut()


@pytest.fixture
async def cabled_service(service_process: ServiceFactory, own_wire: Wire, postgres: PostgresDatabase, cable: Cable) -> ServiceProcess:
    """A process that reaches its Postgres by the cable alone."""
    environment = {"TESSERA_TOKENIZER__POSTGRES__HOST": "127.0.0.1", "TESSERA_TOKENIZER__POSTGRES__PORT": str(cable.port)}
    return await asyncio.to_thread(service_process, "tokenizer", database=postgres, kafka_prefix=own_wire.prefix, environment=environment)


def generation(**fields: Any) -> GenerationRequested:
    model = MODEL | fields.pop("model", {})
    return GenerationRequested.model_validate(
        {"reply_partition": REPLY_PARTITION, "generation_id": uuid4().hex, "model": model, "messages": MESSAGES, **fields}
    )


def tokenization(**fields: Any) -> TokenizationRequested:
    return TokenizationRequested.model_validate({"reply_partition": REPLY_PARTITION, "encoding": "o200k_base", **fields})


def memory(text: str) -> MemoryRecorded:
    now = datetime.now(UTC)
    return MemoryRecorded(
        memory_id=uuid4().hex, kind="message", origin_id="o1", occurred_at=now, recorded_at=now, importance=0.5, text=text
    )


def expected_count() -> int:
    return count_prompt([PromptMessage(m["role"], m["content"]) for m in MESSAGES], encoding("cl100k_base"), "openai-chat")


async def test_a_prompt_is_counted_and_handed_to_the_generator(service: ServiceProcess, wire: Wire, tenant: str) -> None:
    request = generation()
    sent = await wire.send("generation.requested", request, tenant)
    [event] = await wire.answer("generation.ready", sent)
    ready = GenerationReady.model_validate(event.data)
    assert ready.request == request
    assert (ready.prompt.count, ready.prompt.source) == (expected_count(), "counted")
    assert (event.key, event.attributes["tenantid"], event.attributes["requestid"]) == (
        request.generation_id.encode(),
        tenant,
        f"request-{sent}",
    )


async def test_a_prompt_to_be_grounded_is_handed_to_memory(service: ServiceProcess, wire: Wire, tenant: str) -> None:
    sent = await wire.send("generation.requested", generation(memory={"limit": 3}), tenant)
    [event] = await wire.answer("generation.tokenized", sent)
    assert GenerationTokenized.model_validate(event.data).prompt.count == expected_count()


async def test_an_overlong_prompt_ends_the_generation(service: ServiceProcess, wire: Wire, tenant: str) -> None:
    request = generation(model={"context_tokens": 10})
    sent = await wire.send("generation.requested", request, tenant)
    [event] = await wire.answer("reply", sent)
    failed = GenerationFailed.model_validate(event.data)
    assert (failed.generation_id, failed.problem.code, failed.problem.status) == (request.generation_id, "context_length_exceeded", 400)
    assert event.partition == REPLY_PARTITION


async def test_a_repeated_request_gives_the_same_event(service: ServiceProcess, wire: Wire, tenant: str) -> None:
    request, identity = generation(), str(uuid4())
    for _ in range(2):
        await wire.send("generation.requested", request, tenant, id=identity)
    first, second = await wire.answer("generation.ready", identity, count=2)
    assert (first.id, first.data) == (second.id, second.data)


async def test_a_text_is_encoded_stored_and_decoded(service: ServiceProcess, wire: Wire, tenant: str, database: Database) -> None:
    sent = await wire.send("tokenization.requested", tokenization(text=TEXT), tenant)
    encoded = TokenizationCompleted.model_validate((await wire.answer("reply", sent))[0].data)
    assert list(encoded.tokens) == encoding("o200k_base").encode(TEXT)
    assert encoded.composition_id is not None
    assert (await PostgresVocabulary(database).text(tenant, bytes.fromhex(encoded.composition_id))).decode() == TEXT
    for way in ({"tokens": encoded.tokens}, {"composition_id": encoded.composition_id}):
        asked = await wire.send("tokenization.requested", tokenization(**way), tenant)
        decoded = TokenizationCompleted.model_validate((await wire.answer("reply", asked))[0].data)
        assert (decoded.operation, decoded.text, decoded.tokens) == ("decode", TEXT, encoded.tokens)


async def test_another_tenants_composition_is_not_found(service: ServiceProcess, wire: Wire, tenant: str) -> None:
    sent = await wire.send("tokenization.requested", tokenization(text=TEXT), tenant)
    identity = (await wire.answer("reply", sent))[0].data["composition_id"]
    asked = await wire.send("tokenization.requested", tokenization(composition_id=identity), f"other-{uuid4().hex[:8]}")
    problem = RequestFailed.model_validate((await wire.answer("reply", asked))[0].data).problem
    assert (problem.code, problem.param, problem.status) == ("composition_not_found", "composition_id", 404)


async def test_a_recorded_memory_is_learned(service: ServiceProcess, wire: Wire, tenant: str, database: Database) -> None:
    recorded = memory(TEXT)
    sent = await wire.send("memory.recorded", recorded, tenant, subjectid="s1")
    [event] = await wire.answer("text.tokenized", sent)
    tokenized = TextTokenized.model_validate(event.data)
    assert (tokenized.memory_id, tokenized.encoding) == (recorded.memory_id, "o200k_base")
    assert encoding(tokenized.encoding).decode(tokenized.tokens) == TEXT
    assert (await PostgresVocabulary(database).text(tenant, bytes.fromhex(tokenized.composition_id))).decode() == TEXT


async def test_a_malformed_request_blocks_nobody(service: ServiceProcess, wire: Wire, tenant: str) -> None:
    bad = await wire.send(
        "tokenization.requested",
        {"reply_partition": REPLY_PARTITION, "encoding": "o200k_base"},
        tenant,
        type=TokenizationRequested.event_type,
    )
    good = await wire.send("tokenization.requested", tokenization(text="fine"), tenant)
    assert (await wire.answer("reply", good))[0].data["text"] == "fine"
    assert (await wire.answer("reply", bad))[0].data["problem"]["code"] == "data_invalid"


async def encoded_or_problem(wire: Wire, tenant: str) -> str:
    sent = await wire.send("tokenization.requested", tokenization(text=TEXT), tenant)
    data = (await wire.answer("reply", sent))[0].data
    return str(data["problem"]["code"] if "problem" in data else data["text"])


async def test_without_postgres_chats_go_on_and_the_rest_is_told_at_once(
    cabled_service: ServiceProcess, own_wire: Wire, tenant: str
) -> None:
    storing = await own_wire.send("tokenization.requested", tokenization(text=TEXT), tenant)
    counting = await own_wire.send("generation.requested", generation(), tenant)
    decoding = await own_wire.send("tokenization.requested", tokenization(tokens=encoding("o200k_base").encode(TEXT)), tenant)
    assert (await own_wire.answer("generation.ready", counting))[0].data["prompt"]["count"] == expected_count()
    assert (await own_wire.answer("reply", decoding))[0].data["text"] == TEXT
    problem = (await own_wire.answer("reply", storing))[0].data["problem"]
    assert (problem["code"], problem["status"]) == ("dependency_unavailable", 503)


async def becomes(service: ServiceProcess, expected: tuple[int, str, str]) -> None:
    async def is_so() -> bool:
        return await asyncio.to_thread(service.readiness, "postgres") == expected

    held: bool = await eventually(is_so)
    assert held


async def test_postgres_lost_and_found(cabled_service: ServiceProcess, own_wire: Wire, cable: Cable, tenant: str) -> None:
    """The breaker opens, a recorded memory waits; when Postgres is back, the same process learns it and is ready again."""
    cable.mend()
    await becomes(cabled_service, (200, "ready", "closed"))
    cable.cut()
    waiting = await own_wire.send("memory.recorded", memory(TEXT), tenant)
    await becomes(cabled_service, (200, "degraded", "open"))
    assert await encoded_or_problem(own_wire, tenant) == "dependency_unavailable"
    cable.mend()
    [event] = await own_wire.answer("text.tokenized", waiting)
    assert encoding("o200k_base").decode(event.data["tokens"]) == TEXT
    await becomes(cabled_service, (200, "ready", "closed"))
    assert await encoded_or_problem(own_wire, tenant) == TEXT


async def test_a_kill_before_the_offset_repeats_without_another_effect(
    service_process: ServiceFactory, own_wire: Wire, postgres: PostgresDatabase, tenant: str
) -> None:
    """SIGKILL after the answer and before its offset is committed: the event comes again and makes the very same one."""
    crash = {"TESSERA_TOKENIZER__CRASH_POINT": "emitted_before_offset"}
    service = service_process("tokenizer", database=postgres, kafka_prefix=own_wire.prefix, environment=crash)
    sent = await own_wire.send("memory.recorded", memory(TEXT), tenant)
    await own_wire.answer("text.tokenized", sent)
    await asyncio.to_thread(_ended_by_kill, service)
    service.override(TESSERA_TOKENIZER__CRASH_POINT="")
    await asyncio.to_thread(_started_again, service)
    first, second = await own_wire.answer("text.tokenized", sent, count=2)
    assert (first.id, first.data) == (second.id, second.data)


def _ended_by_kill(service: ServiceProcess) -> None:
    process = service._process
    assert process is not None
    assert process.wait(15) == -9


def _started_again(service: ServiceProcess) -> None:
    service.stop()
    service.start()
    service.wait_ready()
