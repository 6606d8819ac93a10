"""The generator as a process on a real Kafka and a real Postgres, seen from the log alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from tessera.contracts import GenerationCancelled, TextTokenized
from tessera.encodings import encoding
from tessera.generator.ports import NewJob
from tessera.testkit import CloudEventProducer, CloudEventReader, PostgresDatabase, ServiceProcess, Stack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

CHUNK, COMPLETED, FAILED = (f"tessera.generation.{kind}.v1" for kind in ("chunk", "completed", "failed"))
NewJobs = Callable[..., NewJob]
Services = Callable[..., ServiceProcess]


class Platform:
    """The other services, as far as the generator can tell."""

    def __init__(self, stack: Stack, prefix: str) -> None:
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

    async def teach(self, text: str, tenant_id: str = "acme") -> None:
        tokens = encoding("o200k_base").encode(text)
        event = TextTokenized(memory_id=str(uuid4()), encoding="o200k_base", tokens=tokens, composition_id="ab" * 32)
        await self._producer.publish("text.tokenized", event, key=event.memory_id.encode(), tenantid=tenant_id)

    async def end_of(self, generation_id: str) -> Any:
        """The event that ended the generation."""
        seen = await self.replies.until(lambda events: any(ends(event, generation_id) for event in events), timedelta(seconds=25))
        return next(event for event in seen if ends(event, generation_id))

    def chunks(self, generation_id: str) -> list[dict[str, Any]]:
        return [event.data for event in self.replies.seen if event.type == CHUNK and event.data["generation_id"] == generation_id]


def ends(event: Any, generation_id: str) -> bool:
    return event.type in (COMPLETED, FAILED) and event.data["generation_id"] == generation_id


@pytest.fixture
async def platform(stack: Stack, kafka_prefix: str) -> AsyncIterator[Platform]:
    platform = Platform(stack, kafka_prefix)
    yield platform
    await platform.replies.close()
    await platform.models.close()


@pytest.fixture
def start(service_process: Services, prepared: PostgresDatabase, kafka_prefix: str, upstream: Any) -> Services:
    """Starts a generator whose provider `up` is the upstream."""
    providers = [
        {
            "name": "up",
            "base_url": upstream.base_url,
            "api_key": "sk-secret",
            "models": ["up", {"id": "up-text", "capability": "completion"}],
        }
    ]

    def started(**environment: str) -> ServiceProcess:
        variables = {"TESSERA_GENERATOR__PROVIDERS": json.dumps(providers), "TESSERA_GENERATOR__LEASE_SECONDS": "2", **environment}
        return service_process("generator", database=prepared, kafka_prefix=kafka_prefix, environment=variables, wait=False)

    return started


async def ready(service: ServiceProcess) -> ServiceProcess:
    await asyncio.to_thread(service.wait_ready)
    return service


async def test_a_provider_streams_through_the_log(start: Services, platform: Platform, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams(*map(upstream.said, ["Hel", "lo ", "wor", "ld"]), upstream.finished(), upstream.usage(11, 5), pause=0.03)
    await ready(start())
    job = new_job("up")
    generation_id = await platform.ask(job)
    end = await platform.end_of(generation_id)
    chunks = platform.chunks(generation_id)
    assert end.type == COMPLETED
    assert end.data["text"] == "".join(chunk["text"] for chunk in chunks) == "Hello world"
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks))) == list(range(end.data["last_index"] + 1))
    assert [chunk["text_offset"] for chunk in chunks] == [sum(len(c["text"]) for c in chunks[:at]) for at in range(len(chunks))]
    assert chunks[0]["text"] == "Hel"
    assert end.data["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "source": "provider"}
    assert {event.partition for event in platform.replies.seen} == {3}
    assert end.attributes["requestid"] == "req-1"
