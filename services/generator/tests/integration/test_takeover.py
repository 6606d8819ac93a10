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


@pytest.fixture(scope="module")
def generator(new_generator: NewGenerator) -> ServiceProcess:
    """A generator that will be killed; each test leaves it running without a crash point."""
    return new_generator(TESSERA_GENERATOR__LEASE_SECONDS="1", TESSERA_GENERATOR__DRAIN_SECONDS="0.5")


async def start(process: ServiceProcess, crash_point: str = "") -> None:
    """It runs afterwards, and dies at the point; one that runs already is only started again where it must die."""
    if process.pid is not None and not crash_point:
        return
    await asyncio.to_thread(process.stop)
    process.override(TESSERA_GENERATOR__CRASH_POINT=crash_point)
    await asyncio.to_thread(process.start)
    await asyncio.to_thread(process.wait_ready)


async def killed(process: ServiceProcess) -> None:
    """Waits until the process has killed itself at its crash point."""
    await eventually(lambda: process.pid is None, timeout=30)


async def test_a_deterministic_engine_resumes_where_it_was_cut(others: Any, generator: ServiceProcess, new_job: NewJobs) -> None:
    """Twice: before the reader had what was recorded, and after."""
    tenant_id = f"t{uuid4().hex[:8]}"
    await others.learn_directly(SENTENCE, tenant_id)
    await start(generator, CHUNK_RECORDED_BEFORE_SENT)
    generation_id = await others.ask(new_job("local/ngram", prompt="A", tenant_id=tenant_id, parameters={"temperature": 0}))
    await killed(generator)
    generator.override(TESSERA_GENERATOR__CRASH_POINT=CHUNK_SENT)
    await asyncio.to_thread(generator.start)  # it may die before it is ready
    await killed(generator)
    await start(generator)
    end = await others.end_of(generation_id)
    assert end.data["text"] == SENTENCE.removeprefix("A")
    assert end.data["attempt"] >= 3
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
