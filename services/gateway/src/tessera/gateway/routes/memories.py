"""`/v1/memories`, its batch and search, and `/v1/ingest/{event_id}`."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import ValidationError

from tessera.contracts import opened
from tessera.contracts.events import AwaitedWrite, RecalledMemory
from tessera.gateway.domain.consistency import Token
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers import memories
from tessera.gateway.handlers.memories import Item
from tessera.gateway.routes.context import Caller, IdempotencyKey, MemoryReader, MemoryWriter
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.consistency import EVENTUAL, WrittenView, read_view
from tessera.gateway.routes.schemas.memories import (
    ITEMS,
    AcceptedView,
    BatchBody,
    BatchItemView,
    BatchView,
    IngestionItem,
    IngestionView,
    MemoryView,
    SearchBody,
    SearchView,
    event_of,
)
from tessera.gateway.routes.streaming import unless_disconnected
from tessera.gateway.routes.validation import of_validation

router = APIRouter(route_class=CarefulRoute, tags=["memory"])


@router.post("/v1/memories", status_code=202)
async def create_memory(body: IngestionItem, caller: MemoryWriter, idempotency_key: IdempotencyKey = None) -> AcceptedView:
    """Publish a message, document, entity or relation. `accepted`: it is in the log. `spooled`: on disk until the log is back."""
    accepted, _ = await _ingest(caller, body, idempotency_key, 0)
    return accepted


@router.post("/v1/memories/batch", status_code=202)
async def create_memories(body: BatchBody, caller: MemoryWriter, idempotency_key: IdempotencyKey = None) -> BatchView:
    """Publish up to 500 items. A wrong one is refused alone; its result says why."""
    writes: list[AwaitedWrite] = []
    results = await asyncio.gather(*(_result(caller, item, idempotency_key, index, writes) for index, item in enumerate(body.items)))
    failures = [result for result in results if isinstance(result, ApiError)]
    if len(failures) == len(results):
        raise failures[0]
    data = [_failed(index, result) if isinstance(result, ApiError) else result for index, result in enumerate(results)]
    counts = {status: sum(item.status == status for item in data) for status in ("accepted", "spooled", "refused", "failed")}
    return BatchView(**counts, data=data, consistency=_written(caller, writes) if writes else None)


@router.get("/v1/ingest/{event_id}")
async def retrieve_ingestion(event_id: Annotated[str, Path(min_length=1, max_length=512)], caller: MemoryReader) -> IngestionView:
    """Where an ingested event stands."""
    if caller.rooms.handoff.knows(caller.tenant_id, event_id):
        return IngestionView(event_id=event_id, status="spooled", memory_ids=[], reason=None)
    report = await memories.inspect(caller.rooms.log, event_id, caller.call)
    consistency = _written(caller, report.writes, event_id) if report.writes else None
    return IngestionView(
        event_id=event_id, status=report.state, memory_ids=list(report.memory_ids), reason=report.reason, consistency=consistency
    )


@router.post("/v1/memories/search")
async def search_memories(body: SearchBody, request: Request, caller: MemoryReader) -> SearchView:
    """The best memories of your tenant, each with the parts of its score; with `consistency` as fresh as you ask for, or an error."""
    rooms, tenant_id = caller.rooms, caller.tenant_id
    fresh = body.consistency.fresh(rooms.tokens, tenant_id, caller.call.patience, param="consistency") if body.consistency else EVENTUAL
    searching = memories.search(rooms.log, body.query, caller.call, limit=body.limit, recall_filter=body.filter, fresh=fresh)
    found = await unless_disconnected(request, searching)
    consistency = read_view(fresh.wanted.level, found.freshness, rooms.tokens, tenant_id)
    return SearchView(data=[_memory_view(memory) for memory in found.memories], degraded=list(found.degraded), consistency=consistency)


async def _ingest(caller: Caller, item: Any, idempotency_key: str | None, index: int) -> tuple[AcceptedView, AwaitedWrite]:
    event_id = memories.item_id(caller.tenant_id, item.id, idempotency_key, index)
    rooms, given = caller.rooms, Item(event_of(item), event_id, item.subject_id)
    taken = await memories.ingest(rooms.handoff, rooms.log, given, caller.call)
    consistency = _written(caller, [taken.write], event_id)
    return AcceptedView(event_id=event_id, status=taken.status, consistency=consistency), taken.write


def _written(caller: Caller, writes: Sequence[AwaitedWrite], event_id: str | None = None) -> WrittenView:
    token = caller.rooms.tokens.issued(caller.tenant_id, Token(tuple(writes)))
    return WrittenView(token=token, status_url=f"/v1/ingest/{event_id}" if event_id else None)


async def _result(
    caller: Caller, raw: Any, idempotency_key: str | None, index: int, writes: list[AwaitedWrite]
) -> BatchItemView | ApiError:
    """An ApiError only where the fault is ours; what is wrong with the item is its result. Adds what was taken to `writes`."""
    try:
        item = ITEMS.validate_python(raw)
        accepted, write = await _ingest(caller, item, idempotency_key, index)
    except ValidationError as error:
        return _refused(index, of_validation(error.errors(), raw, prefix=f"items[{index}]."))
    except ApiError as error:
        return error if error.status >= 500 else _refused(index, error)
    writes.append(write)
    return BatchItemView(index=index, status=accepted.status, event_id=accepted.event_id, consistency=accepted.consistency)


def _refused(index: int, error: ApiError) -> BatchItemView:
    return BatchItemView(index=index, status="refused", error=error.body()["error"])


def _failed(index: int, error: ApiError) -> BatchItemView:
    return BatchItemView(index=index, status="failed", error=error.body()["error"])


def _memory_view(memory: RecalledMemory) -> MemoryView:
    fields = memory.model_dump(mode="json", exclude={"memory_id", "text", "scores"})
    return MemoryView(id=memory.memory_id, text=opened(memory.text), scores=memory.scores, **fields)
