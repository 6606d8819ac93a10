"""Killed with SIGKILL in mid-stream and started again: what was begun is continued truthfully or ends with an error, never in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from tessera.encodings import encoding
from tessera.generator.ports import NewJob
from tessera.generator.speaking import CHUNK_RECORDED_BEFORE_SENT, CHUNK_SENT
from tessera.testkit import ServiceProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]
NewJobs = Callable[..., NewJob]
NewGenerator = Callable[..., ServiceProcess]
SENTENCE = "A mosaic is made of many small tiles, each of them cut by hand and set in mortar."


@pytest.fixture
async def generator(new_generator: NewGenerator) -> Any:
    """A running generator that will be killed, and started again without its crash point."""
    process = new_generator(TESSERA_GENERATOR__LEASE_SECONDS="1")
    yield process
    await asyncio.to_thread(process.stop)


async def start(process: ServiceProcess, crash_point: str = "") -> None:
    process.override(TESSERA_GENERATOR__CRASH_POINT=crash_point)
    await asyncio.to_thread(process.start)
    await asyncio.to_thread(process.wait_ready)


async def killed(process: ServiceProcess) -> None:
    """Waits until the process has killed itself at its crash point."""
    await eventually(lambda: process.pid is None, timeout=30)


@pytest.mark.parametrize("crash_point", [CHUNK_RECORDED_BEFORE_SENT, CHUNK_SENT])
async def test_a_deterministic_engine_resumes_where_it_was_cut(
    others: Any, generator: ServiceProcess, new_job: NewJobs, crash_point: str
) -> None:
    tenant_id = f"t{uuid4().hex[:8]}"
    await others.learn_directly(SENTENCE, tenant_id)
    await start(generator, crash_point)
    generation_id = await others.ask(new_job("local/ngram", prompt="A", tenant_id=tenant_id, parameters={"temperature": 0}))
    await killed(generator)
    await start(generator)
    end = await others.end_of(generation_id)
    assert end.data["text"] == SENTENCE.removeprefix("A")
    assert end.data["attempt"] >= 2
    assert end.data["usage"]["completion_tokens"] == len(encoding("o200k_base").encode(end.data["text"]))
    assert said_by(others.chunks(generation_id), end.data["last_index"]) == end.data["text"]


def said_by(chunks: list[dict[str, Any]], last_index: int) -> str:
    """What a reader makes of the chunks: the first of each index, in order, each where it belongs."""
    text = ""
    for index in range(last_index + 1):
        candidates = {(chunk["text_offset"], chunk["text"]) for chunk in chunks if chunk["index"] == index}
        assert len(candidates) == 1, f"chunk {index} is missing or differs: {candidates}"
        ((offset, piece),) = candidates
        assert offset == len(text)
        text += piece
    return text


async def test_a_provider_that_was_cut_is_not_called_again(others: Any, upstream: Any, generator: ServiceProcess, new_job: NewJobs) -> None:
    upstream.streams_endlessly()
    await start(generator, CHUNK_SENT)
    generation_id = await others.ask(new_job("up"))
    await killed(generator)
    await start(generator)
    end = await others.end_of(generation_id)
    assert (end.data["problem"]["code"], end.data["last_index"]) == ("generation_interrupted", 0)
    assert end.data["attempt"] >= 2
    assert len(upstream.requests) == 1


async def test_a_generation_nobody_saw_yet_starts_again(others: Any, upstream: Any, generator: ServiceProcess, new_job: NewJobs) -> None:
    upstream.streams(upstream.said("slow"), upstream.finished(), pause=2)
    upstream.streams_well("again")
    await start(generator)
    generation_id = await others.ask(new_job("up", stream=False))
    await eventually(lambda: upstream.requests)
    await asyncio.to_thread(generator.kill)
    await start(generator)
    end = await others.end_of(generation_id)
    assert end.data["text"] == "again"
    assert end.data["attempt"] >= 2


async def test_a_stop_gives_back_what_it_cannot_finish(others: Any, upstream: Any, generator: ServiceProcess, new_job: NewJobs) -> None:
    upstream.streams_endlessly()
    upstream.streams_well("elsewhere")
    generator.override(TESSERA_GENERATOR__DRAIN_SECONDS="0.5")
    await start(generator)
    generation_id = await others.ask(new_job("up", stream=False))
    await eventually(lambda: upstream.open_streams == 1)
    await asyncio.to_thread(generator.stop)
    async with asyncio.timeout(10):
        await upstream.disconnected.wait()
    await start(generator)
    end = await others.end_of(generation_id)
    assert end.data["text"] == "elsewhere"
    assert end.data["attempt"] >= 2
