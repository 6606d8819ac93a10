"""A database and topics of the generator's own, and the other services as far as the generator can tell."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts import GenerationCancelled, TextTokenized
from tessera.encodings import encoding
from tessera.generator.adapters.postgres_ngrams import PostgresNgramLearner
from tessera.generator.ports import NewJob, TokenizedText
from tessera.local.ports import free_ports
from tessera.storage import Database
from tessera.testkit import CloudEventProducer, CloudEventReader, PostgresDatabase, ServiceProcess, Stack, eventually, unique_kafka_prefix

NewGenerator = Callable[..., ServiceProcess]
CHUNK, COMPLETED, FAILED = (f"tessera.generation.{kind}.v1" for kind in ("chunk", "completed", "failed"))


@pytest.fixture(scope="module")
def prepared(postgres_database: Callable[..., PostgresDatabase]) -> PostgresDatabase:
    return postgres_database("generator")


@pytest.fixture
async def database(prepared: PostgresDatabase) -> AsyncIterator[Database]:
    opened = Database("generator", prepared.settings("generator"))
    yield opened
    await opened.close()


class Others:
    """The other services, as far as the generator can tell."""

    def __init__(self, stack: Stack, prefix: str, database: Database) -> None:
        self._database = database
        self._producer = CloudEventProducer(stack.kafka_bootstrap_servers, prefix, source="/tessera/test")
        self.replies = CloudEventReader(stack.kafka_bootstrap_servers, "reply", topic_prefix=prefix)
        self.models = CloudEventReader(stack.kafka_bootstrap_servers, "model.declared", topic_prefix=prefix)

    async def ask(self, job: NewJob, **attributes: str) -> str:
        request = job.ready.request
        await self._producer.publish(
            "generation.ready",
            job.ready,
            key=request.generation_id.encode(),
            tenantid=job.origin.tenant_id,
            requestid="req-1",
            **attributes,
        )
        return request.generation_id

    async def cancel(self, generation_id: str, tenant_id: str = "acme") -> None:
        event = GenerationCancelled(generation_id=generation_id, reason="client_request")
        await self._producer.publish("generation.cancelled", event, key=generation_id.encode(), tenantid=tenant_id)

    async def teach(self, content: str, tenant_id: str = "acme") -> None:
        tokens = encoding("o200k_base").encode(content)
        event = TextTokenized(memory_id=str(uuid4()), encoding="o200k_base", tokens=tokens, composition_id="ab" * 32)
        await self._producer.publish("text.tokenized", event, key=event.memory_id.encode(), tenantid=tenant_id)

    async def learn_directly(self, content: str, tenant_id: str) -> None:
        """Puts a text into the n-gram tables without a running generator."""
        tokens = encoding("o200k_base").encode(content)
        async with self._database.transaction() as connection:
            learner = PostgresNgramLearner(SimpleNamespace(connection=connection))
            await learner.learn(TokenizedText(tenant_id, None, str(uuid4()), "o200k_base", tokens, "ab" * 32))

    async def end_of(self, generation_id: str) -> Any:
        """The event that ended the generation."""
        seen = await self.replies.until(lambda events: any(ends(event, generation_id) for event in events), timedelta(seconds=25))
        return next(event for event in seen if ends(event, generation_id))

    async def cancelled_in_database(self, generation_id: str) -> None:
        """Waits for the row that a cancellation leaves."""
        await self._until_rows("SELECT count(*) FROM generation_job WHERE generation_id = :name AND state = 'cancelled'", generation_id, 1)

    async def learned(self, tenant_id: str, texts: int) -> None:
        """Waits until the n-gram engine has learned that many texts."""
        await self._until_rows("SELECT count(*) FROM ngram_learned WHERE tenant_id = :name", tenant_id, texts)

    async def _until_rows(self, query: str, name: str, count: int) -> None:
        async def found() -> bool:
            async with self._database.transaction() as connection:
                return bool(await connection.scalar(text(query), {"name": name}) == count)

        await eventually(found)

    async def spoken(self, generation_id: str, *, chunks: int) -> None:
        """Waits until so many chunks of the generation have come."""
        await self.replies.until(lambda _: len(self.chunks(generation_id)) >= chunks, timedelta(seconds=60))

    def chunks(self, generation_id: str) -> list[dict[str, Any]]:
        return [event.data for event in self.replies.seen if event.type == CHUNK and event.data["generation_id"] == generation_id]


def ends(event: Any, generation_id: str) -> bool:
    return event.type in (COMPLETED, FAILED) and event.data["generation_id"] == generation_id


@pytest.fixture(scope="module")
def module_prefix(stack: Stack) -> str:
    """Topics of this module's own."""
    prefix = unique_kafka_prefix()
    kafka = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=prefix, keyed_partitions=2)
    asyncio.run(ensure_all(kafka))
    return prefix


@pytest.fixture(scope="module")
def upstream_port() -> int:
    """Known before the upstream starts, so that one generator serves the whole module."""
    return free_ports(("upstream",))["upstream"]


@pytest.fixture
async def others(stack: Stack, module_prefix: str, database: Database) -> AsyncIterator[Others]:
    """The log, as the other services write and read it."""
    others = Others(stack, module_prefix, database)
    yield others
    await others.replies.close()
    await others.models.close()


@pytest.fixture(scope="module")
def new_generator(
    stack: Stack, prepared: PostgresDatabase, module_prefix: str, upstream_port: int
) -> Iterator[Callable[..., ServiceProcess]]:
    """Makes generators (not started yet) whose provider `up` is the upstream; they are stopped at the end."""
    models = ["up", {"id": "up-text", "capability": "completion"}]
    providers = [
        {
            "name": "up",
            "base_url": f"http://127.0.0.1:{upstream_port}/v1",
            "api_key": "sk-secret",
            "models": models,
            "breaker_reset_seconds": 0.5,
        },
        {"name": "down", "base_url": "http://127.0.0.1:9/v1", "models": ["down"], "attempts": 1, "breaker_failures": 2},
    ]
    with contextlib.ExitStack() as made:

        def make(**environment: str) -> ServiceProcess:
            variables = {"TESSERA_GENERATOR__PROVIDERS": json.dumps(providers), "TESSERA_GENERATOR__LEASE_SECONDS": "2", **environment}
            process = ServiceProcess("generator", stack, prepared, module_prefix, variables)
            made.callback(process.stop)
            return process

        yield make
