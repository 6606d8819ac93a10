"""Jobs to run, and a real HTTP server that speaks the OpenAI API as well, or as badly, as a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tessera.bus import Origin
from tessera.contracts import (
    ChatMessage,
    GenerationParameters,
    GenerationReady,
    GenerationRequested,
    ModelReference,
    PromptTokens,
)
from tessera.contracts.events.memory import RecalledMemory, RecallScores
from tessera.generator.domain.transcript import Progress
from tessera.generator.ports import Job, NewJob
from tessera.testkit import eventually

Answer = Callable[[dict[str, Any]], Awaitable[Response]]


def _memory(memory_id: str, text: str) -> RecalledMemory:
    return RecalledMemory(
        memory_id=memory_id,
        kind="message",
        text=text,
        scores=RecallScores(total=1.0),
        occurred_at=datetime.now(UTC),
        importance=0.5,
        origin_id=memory_id,
    )


def _new_job(
    provider: str = "local/quote", *, tenant_id: str = "acme", deadline: timedelta = timedelta(minutes=5), **request: Any
) -> NewJob:
    generation_id = request.pop("generation_id", f"gen-{uuid4()}")
    memories = tuple(_memory(*memory) for memory in request.pop("memories", ()))
    recall = request.pop("recall", "complete" if memories else "not_asked")
    content = {} if "prompt" in request else {"messages": (ChatMessage(role="user", content="Hello?"),)}
    model = ModelReference(
        model_id=request.pop("model_id", provider),
        provider=provider,
        capability="completion" if "prompt" in request else "chat",
        encoding="o200k_base",
        template="plain",
        exact=request.pop("exact", True),
    )
    parameters = GenerationParameters(**request.pop("parameters", {}))
    generation = GenerationRequested(
        **{"reply_partition": 3, "stream": True, **content, **request}, generation_id=generation_id, model=model, parameters=parameters
    )
    ready = GenerationReady(request=generation, prompt=PromptTokens(count=7, source="counted"), memories=memories, recall=recall)
    origin = Origin(tenant_id=tenant_id, parent_id=str(uuid4()), request_id="req-1", correlation_id=generation_id, reply_partition=3)
    return NewJob(ready, provider, origin, datetime.now(UTC) + deadline)


@pytest.fixture
def new_job() -> Callable[..., NewJob]:
    """Makes a job as the handler does: a chat, unless a prompt is given."""
    return _new_job


@pytest.fixture
def leased_job() -> Callable[..., Job]:
    """Makes a job as a worker gets it."""

    def lease(*arguments: Any, attempt: int = 1, progress: Progress | None = None, **keywords: Any) -> Job:
        new = _new_job(*arguments, **keywords)
        generation_id = new.ready.request.generation_id
        return Job(new.origin.tenant_id, generation_id, new.ready, new.origin, new.deadline, attempt, progress or Progress())

    return lease


@dataclass
class Upstream:
    """`answers` are used up in order; the last one stays."""

    base_url: str = ""
    answers: list[Answer] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open_streams: int = 0
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: Request) -> Response:
        self.requests.append(await request.json())
        self.paths.append(request.url.path)
        self.headers.append(dict(request.headers))
        chosen = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await chosen(self.requests[-1])

    def streams_endlessly(self, text: str = "word ", pause: float = 0.02) -> None:
        """Says the same for ever, and notices when nobody listens any more."""

        async def body() -> AsyncIterator[bytes]:
            self.open_streams += 1
            try:
                while True:
                    yield self.said(text)
                    await asyncio.sleep(pause)
            finally:
                self.open_streams -= 1
                self.disconnected.set()

        async def answer(_: dict[str, Any]) -> Response:
            return StreamingResponse(body(), media_type="text/event-stream")

        self.answers.append(answer)

    @staticmethod
    def event(**document: Any) -> bytes:
        return b"data: " + json.dumps(document).encode() + b"\n\n"

    @classmethod
    def said(cls, content: str, **choice: Any) -> bytes:
        """One chunk of a chat completion."""
        return cls.event(choices=[{"index": 0, "delta": {"content": content}, "finish_reason": None, **choice}])

    @classmethod
    def finished(cls, reason: str = "stop") -> bytes:
        return cls.event(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])

    @classmethod
    def usage(cls, prompt_tokens: int, completion_tokens: int) -> bytes:
        return cls.event(choices=[], usage={"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})

    def streams(self, *parts: bytes, pause: float = 0.0, cut: bool = False) -> None:
        """The next answer streams the parts; `cut` breaks the connection off instead of ending it."""

        async def body() -> AsyncIterator[bytes]:
            for part in parts:
                yield part
                await asyncio.sleep(pause)
            if cut:
                raise ConnectionAbortedError

        async def answer(_: dict[str, Any]) -> Response:
            return StreamingResponse(body(), media_type="text/event-stream")

        self.answers.append(answer)

    def streams_well(self, *texts: str) -> None:
        """The next answer streams the texts, the usage 11 + 5 and the end."""
        self.streams(*map(self.said, texts), self.finished(), self.usage(11, 5), b"data: [DONE]\n\n")

    def refuses(self, status: int, error: Any = None, headers: dict[str, str] | None = None) -> None:
        """The next answer is an error."""

        async def answer(_: dict[str, Any]) -> Response:
            return JSONResponse({"error": error or {"message": "no"}}, status, headers)

        self.answers.append(answer)

    def answers_whole(self, **document: Any) -> None:
        """The next answer is one document."""

        async def answer(_: dict[str, Any]) -> Response:
            return JSONResponse(document)

        self.answers.append(answer)


@pytest.fixture
def upstream_port() -> int:
    """A free port; a module that needs to know it beforehand has a fixture of its own."""
    return 0


@pytest.fixture
async def upstream(upstream_port: int) -> AsyncIterator[Upstream]:
    """The server, on the loop-back interface, in the test's event loop."""
    upstream = Upstream()
    routes = [Route(path, upstream.answer, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/completions")]
    config = uvicorn.Config(Starlette(routes=routes), port=upstream_port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())  # `serve` would take the test run's signals
    await eventually(lambda: server.started)
    upstream.base_url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield upstream
    server.should_exit = server.force_exit = True
    await serving
