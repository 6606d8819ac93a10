"""The generator as a process on a real Kafka and a real Postgres, seen from the log alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tessera.contracts import ChatMessage
from tessera.encodings import encoding
from tessera.generator.ports import NewJob
from tessera.testkit import ServiceProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
NewJobs = Callable[..., NewJob]


@pytest.fixture(scope="module")
def service(new_generator: Callable[..., ServiceProcess]) -> ServiceProcess:
    """One generator for the whole module."""
    process = new_generator()
    process.start()
    process.wait_ready()
    return process


@pytest.fixture(autouse=True)
def _running(service: ServiceProcess) -> None:
    """Every test here is one of the running service."""


async def test_a_provider_streams_through_the_log(others: Any, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams(*map(upstream.said, ["Hel", "lo ", "wor", "ld"]), upstream.finished(), upstream.usage(11, 5), pause=0.03)
    job = new_job("up")
    generation_id = await others.ask(job)
    end = await others.end_of(generation_id)
    chunks = others.chunks(generation_id)
    assert end.type.endswith("completed.v1")
    assert end.data["text"] == "".join(chunk["text"] for chunk in chunks) == "Hello world"
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks))) == list(range(end.data["last_index"] + 1))
    assert [chunk["text_offset"] for chunk in chunks] == [sum(len(c["text"]) for c in chunks[:at]) for at in range(len(chunks))]
    assert chunks[0]["text"] == "Hel"
    assert end.data["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "source": "provider"}
    assert {event.partition for event in others.replies.seen if event.data["generation_id"] == generation_id} == {3}
    assert end.attributes["requestid"] == "req-1"


async def test_a_generation_that_is_not_streamed_has_no_chunks(others: Any, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams(upstream.said("Hello "), upstream.said("world"), upstream.finished())
    generation_id = await others.ask(new_job("up", stream=False))
    end = await others.end_of(generation_id)
    assert (end.data["text"], end.data["last_index"]) == ("Hello world", -1)
    assert others.chunks(generation_id) == []
    assert end.data["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "source": "counted"}


async def test_a_stop_sequence_across_chunks_ends_the_generation_and_the_connection(others: Any, upstream: Any, new_job: NewJobs) -> None:
    texts = ["One\U0001f600", "\U0001f600", "EN", "D and more"]
    upstream.streams(*map(upstream.said, texts), *[upstream.said("never")] * 50, upstream.finished("length"), pause=0.06)
    generation_id = await others.ask(new_job("up", parameters={"stop": ("\U0001f600END",)}))
    end = await others.end_of(generation_id)
    assert (end.data["text"], end.data["finish_reason"]) == ("One\U0001f600", "stop")
    assert "".join(chunk["text"] for chunk in others.chunks(generation_id)) == "One\U0001f600"


async def test_cancelling_closes_the_providers_connection(others: Any, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams_endlessly()
    generation_id = await others.ask(new_job("up"))
    await eventually(lambda: upstream.open_streams == 1)
    await others.cancel(generation_id)
    async with asyncio.timeout(10):
        await upstream.disconnected.wait()
    end = await others.end_of(generation_id)
    assert end.data["problem"]["code"] == "generation_cancelled"
    assert end.data["usage"]["completion_tokens"] > 0


async def test_a_cancellation_that_comes_first(others: Any, upstream: Any, new_job: NewJobs) -> None:
    job = new_job("up")
    generation_id = job.ready.request.generation_id
    await others.cancel(generation_id)
    await others.cancelled_in_database(generation_id)
    await others.ask(job)
    assert (await others.end_of(generation_id)).data["problem"]["code"] == "generation_cancelled"
    assert upstream.requests == []


async def test_another_tenant_cannot_cancel(others: Any, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams(*[upstream.said("a ")] * 10, upstream.finished(), pause=0.1)
    generation_id = await others.ask(new_job("up"))
    await eventually(lambda: upstream.requests)
    await others.cancel(generation_id, tenant_id="mallory")
    assert (await others.end_of(generation_id)).type.endswith("completed.v1")


async def test_the_deadline_ends_a_running_generation(others: Any, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams_endlessly()
    generation_id = await others.ask(new_job("up"), deadline=(datetime.now(UTC) + timedelta(seconds=1.5)).isoformat())
    end = await others.end_of(generation_id)
    assert end.data["problem"]["code"] == "deadline_exceeded"
    async with asyncio.timeout(10):
        await upstream.disconnected.wait()


async def test_a_cut_stream_is_an_error_and_not_an_end(others: Any, upstream: Any, new_job: NewJobs) -> None:
    upstream.streams(upstream.said("half"), cut=True)
    end = await others.end_of(await others.ask(new_job("up")))
    assert (end.data["problem"]["code"], end.data["last_index"]) == ("generation_interrupted", 0)


@pytest.mark.parametrize(("model_id", "code"), [("gone", "model_not_found"), ("local/ngram", "model_capability_mismatch")])
async def test_what_cannot_run_is_answered(others: Any, new_job: NewJobs, model_id: str, code: str) -> None:
    end = await others.end_of(await others.ask(new_job("up", model_id=model_id)))
    assert end.data["problem"]["code"] == code


async def test_an_open_breaker_delays_jobs_and_stalls_nobody_else(
    others: Any, upstream: Any, service: ServiceProcess, new_job: NewJobs
) -> None:
    for _ in range(2):
        failed = await others.end_of(await others.ask(new_job("down")))
        assert failed.data["problem"]["code"] == "provider_unavailable"
    delayed = await others.ask(new_job("down"), deadline=(datetime.now(UTC) + timedelta(seconds=5)).isoformat())
    upstream.streams_well("fine")
    assert (await others.end_of(await others.ask(new_job("up")))).data["text"] == "fine"
    await eventually(lambda: '"degraded"' in service.get_admin("/health/ready")[1])
    assert service.get_admin("/health/ready")[0] == 200
    end = await others.end_of(delayed)
    assert end.data["problem"]["code"] == "expired"


async def test_quotes_from_memory(others: Any, new_job: NewJobs) -> None:
    question = (ChatMessage(role="user", content="Where is the spare key?"),)
    memories = [("m1", "Nice weather. The spare key is under the flower pot."), ("m2", "Bread is at the baker's.")]
    end = await others.end_of(await others.ask(new_job("local/quote", messages=question, memories=memories)))
    expected = "“The spare key is under the flower pot.” [memory:m1]"
    assert (end.data["text"], end.data["source_ids"]) == (expected, ["m1"])
    tokens = len(encoding("o200k_base").encode(expected))
    assert end.data["usage"] == {"prompt_tokens": 7, "completion_tokens": tokens, "source": "counted"}


@pytest.mark.parametrize(("recall", "text"), [("complete", "Memory holds nothing on this."), ("not_asked", "This model answers only")])
async def test_quotes_without_memories(others: Any, new_job: NewJobs, recall: str, text: str) -> None:
    end = await others.end_of(await others.ask(new_job("local/quote", recall=recall)))
    assert end.data["text"].startswith(text)


async def test_the_ngram_engine_has_learned_nothing_at_first(others: Any, new_job: NewJobs) -> None:
    end = await others.end_of(await others.ask(new_job("local/ngram", prompt="Once", tenant_id=f"t{uuid4().hex[:8]}")))
    assert end.data["problem"]["code"] == "model_has_learned_nothing"


async def test_the_ngram_engine_continues_what_it_learned(others: Any, new_job: NewJobs) -> None:
    tenant_id = f"t{uuid4().hex[:8]}"
    for _ in range(3):
        await others.teach("The mosaic \U0001f600 你好 is made of small tiles.", tenant_id)
    await others.learned(tenant_id, 3)

    async def completion(prompt: str, **parameters: Any) -> Any:
        return (
            await others.end_of(await others.ask(new_job("local/ngram", prompt=prompt, tenant_id=tenant_id, parameters=parameters)))
        ).data

    whole = await completion("The mosaic", temperature=0)
    assert (whole["text"], whole["finish_reason"]) == (" \U0001f600 你好 is made of small tiles.", "stop")
    assert whole["usage"]["completion_tokens"] == len(encoding("o200k_base").encode(whole["text"]))
    assert (await completion("The mosaic", temperature=0, max_tokens=1))["finish_reason"] == "length"
    assert (await completion("The mosaic", temperature=0, stop=(" made",)))["text"] == " \U0001f600 你好 is"
    assert (await completion("The", seed=5, temperature=1.5))["text"] == (await completion("The", seed=5, temperature=1.5))["text"]


async def test_metrics_name_the_provider_and_the_outcome(others: Any, service: ServiceProcess, new_job: NewJobs) -> None:
    await others.end_of(await others.ask(new_job("local/quote")))
    metrics = (await asyncio.to_thread(service.get_admin, "/metrics"))[1]
    assert 'tessera_generations_ended_total{outcome="completed",provider="local/quote"}' in metrics
    assert 'tessera_generation_first_chunk_seconds_count{provider="local/quote"}' in metrics
    assert "acme" not in metrics


async def test_every_model_is_declared(others: Any) -> None:
    seen = await others.models.read(5)
    declared = {event.data["model"]["model_id"]: event.data for event in seen}
    assert set(declared) == {"local/ngram", "local/quote", "up", "up-text", "down"}
    assert declared["up-text"]["model"]["capability"] == "completion"
    assert all(model["available"] for model in declared.values())


async def test_one_log_line_has_the_request_and_no_line_the_key(
    others: Any, upstream: Any, service: ServiceProcess, new_job: NewJobs
) -> None:
    upstream.refuses(401, {"message": "sk-secret is wrong"})
    generation_id = await others.ask(new_job("up"))
    await others.end_of(generation_id)
    records = await eventually(lambda: [record for record in service.log_records() if record.get("generation_id") == generation_id])
    assert {record.get("request_id") for record in records} == {"req-1"}
    assert "sk-secret" not in service.log.read_text()
