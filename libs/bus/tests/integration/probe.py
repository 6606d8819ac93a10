"""A small service of its own process: each message becomes one row and one event; each recall is answered with its query."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tessera.bus import Bus, Emitter, Received, Transaction, together
from tessera.bus.service import Runtime, run_service
from tessera.bus.settings import ServiceSettings
from tessera.contracts.errors import FatalError, InvalidError, RetryableError
from tessera.contracts.events import (
    DocumentPublished,
    EmbeddingCompleted,
    EmbeddingRequested,
    EntityPublished,
    FreshnessInspected,
    GenerationTokenized,
    IngestionInspected,
    IngestionReported,
    MemoryRecorded,
    MessagePublished,
    RecallCompleted,
    RecallRequested,
    RelationPublished,
)
from tessera.telemetry import get_logger

_log = get_logger("probe")

_INSERT = text("INSERT INTO effect (tenant_id, event_id, content) VALUES (:tenant_id, :event_id, :content)")


class ProbeSettings(ServiceSettings, service="memory"):
    """Nothing of its own."""


async def apply(event: Received[MessagePublished], transaction: Transaction) -> None:
    """One row, one event. Some contents ask for trouble."""
    content = str(event.data.content)
    await transaction.connection.execute(_INSERT, {"tenant_id": event.tenant_id, "event_id": event.id, "content": content})
    now = datetime.now(UTC)
    recorded = MemoryRecorded(
        memory_id=event.id, kind="message", origin_id=event.id, occurred_at=now, recorded_at=now, importance=0.5, text=content
    )
    await transaction.publish(recorded, step="recorded", key=event.data.conversation_id.encode())
    await _trouble(content)


async def _trouble(content: str) -> None:
    if content == "invalid":
        raise InvalidError("not_wanted", "This content is not wanted.", "content")
    if content == "fatal":
        raise FatalError("asked to stop")
    if content == "bug":
        raise KeyError(content)
    if content == "kill":
        os.kill(os.getpid(), 9)
    if content.startswith("slow"):
        await asyncio.sleep(float(content.removeprefix("slow")))
    if content in ("retry", "late kill"):
        apply.tries = getattr(apply, "tries", 0) + 1  # type: ignore[attr-defined]
        if apply.tries < (3 if content == "retry" else 4):  # type: ignore[attr-defined]
            raise RetryableError("not yet")
    if content == "late kill":
        os.kill(os.getpid(), 9)  # three attempts in place have parked it: it dies as a parked event


async def ignore(event: Received[Any], transaction: Transaction) -> None:
    """Other ingested types have no effect here."""


async def answer(event: Received[RecallRequested], emit: Emitter) -> None:
    """Answers, or fails as the query asks."""
    if event.data.query == "invalid":
        raise InvalidError("query_unwanted", "This query is not wanted.", "query")
    if event.data.query == "busy":
        raise RetryableError("always busy")
    if event.data.query == "bug":
        raise KeyError("bug")
    if event.data.query.startswith("slow"):
        await asyncio.sleep(float(event.data.query.removeprefix("slow")))
    await emit.reply(RecallCompleted(memories=()))


async def embed(event: Received[EmbeddingRequested], emit: Emitter) -> None:
    """Not asked for here."""
    await emit.reply(EmbeddingCompleted.model_construct())


async def inspect(event: Received[IngestionInspected], emit: Emitter) -> None:
    """Knows nothing."""
    await emit.reply(IngestionReported(event_id=event.data.event_id, state="unknown"))


async def unasked(event: Received[Any], emit: Emitter) -> None:
    """Not asked for here."""


def register(bus: Bus, apply_message: Any = apply, answer_recall: Any = answer, *, batched: bool = False) -> None:
    """All handlers of ingestion and chat; `batched` where `apply_message` takes many messages at once."""
    ingestion = bus.consumer("ingestion")
    (ingestion.transactional_batch if batched else ingestion.transactional)(MessagePublished)(apply_message)
    for other in (DocumentPublished, EntityPublished, RelationPublished):
        ingestion.transactional(other)(ignore)
    chat = bus.consumer("chat")
    chat.replying(RecallRequested)(answer_recall)
    chat.replying(EmbeddingRequested)(embed)
    chat.replying(IngestionInspected)(inspect)
    chat.replying(GenerationTokenized)(unasked)
    chat.replying(FreshnessInspected)(unasked)


async def stream(request: Request) -> StreamingResponse:
    """A stream that ends by itself after `seconds`."""

    async def pieces() -> AsyncIterator[str]:
        for number in range(int(request.path_params["seconds"]) * 10):
            yield f"{number}\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(pieces())


class Worker:
    """Fails at first; then works until told to stop."""

    def __init__(self) -> None:
        self.starts = 0

    async def run(self, stopping: asyncio.Event) -> None:
        self.starts += 1
        if self.starts == 1:
            raise ConnectionError("the first start fails")
        _log.info("worker runs")
        await stopping.wait()
        _log.info("worker ends in peace")


async def close() -> None:
    """Says that it was called."""
    _log.info("closed")


async def build(runtime: Runtime[ProbeSettings]) -> None:
    """Registers everything; an HTTP server where a port is given."""
    if "PROBE_SHARES" in os.environ:  # whatever a transaction takes on this machine
        together.SLOW = together.PATIENCE = timedelta(seconds=30)  # type: ignore[misc]
    register(runtime.bus)
    runtime.add_worker("probe", Worker().run)
    runtime.on_close(close)
    runtime.on_reload(lambda settings: partial(_log.info, "taken", log_level=settings.telemetry.log_level))
    if "PROBE_HTTP_PORT" in os.environ:
        app = Starlette(routes=[Route("/stream/{seconds:int}", stream)])
        runtime.add_http_server(app, "127.0.0.1", int(os.environ["PROBE_HTTP_PORT"]))


if __name__ == "__main__":
    run_service(ProbeSettings, build)
