"""`/v1/memories`, its batch and search, and `/v1/ingest/{event_id}`."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import ValidationError

from tessera.contracts import opened
from tessera.contracts.events import RecalledMemory
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers import memories
from tessera.gateway.handlers.memories import Item
from tessera.gateway.routes.context import Caller, IdempotencyKey, MemoryReader, MemoryWriter
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.memories import (
    ITEMS,
    AcceptedView,
    BatchBody,
    BatchItemView,
    BatchView,
    ConsistencyView,
    IngestionItem,
    IngestionView,
    MemoryView,
    SearchBody,
    SearchView,
    event_of,
)
from tessera.gateway.routes.validation import of_validation

router = APIRouter(route_class=CarefulRoute, tags=["memory"])


@router.post("/v1/memories", status_code=202)
async def create_memory(body: IngestionItem, caller: MemoryWriter, idempotency_key: IdempotencyKey = None) -> AcceptedView:
    """Publish a message, document, entity or relation. `accepted`: it is in the log. `spooled`: on disk until the log is back."""
    return await _ingest(caller, body, idempotency_key, 0)


@router.post("/v1/memories/batch", status_code=202)
async def create_memories(body: BatchBody, caller: MemoryWriter, idempotency_key: IdempotencyKey = None) -> BatchView:
    """Publish up to 500 items. A wrong one is refused alone; its result says why."""
    results = await asyncio.gather(*(_result(caller, item, idempotency_key, index) for index, item in enumerate(body.items)))
    failures = [result for result in results if isinstance(result, ApiError)]
    if len(failures) == len(results):
        raise failures[0]
    data = [_failed(index, result) if isinstance(result, ApiError) else result for index, result in enumerate(results)]
    counts = {status: sum(item.status == status for item in data) for status in ("accepted", "spooled", "refused", "failed")}
    return BatchView(**counts, data=data)


@router.get("/v1/ingest/{event_id}")
async def retrieve_ingestion(event_id: Annotated[str, Path(min_length=1, max_length=512)], caller: MemoryReader) -> IngestionView:
    """Where an ingested event stands."""
    if caller.rooms.handoff.knows(caller.tenant_id, event_id):
        return IngestionView(event_id=event_id, status="spooled", memory_ids=[], reason=None)
    report = await memories.inspect(caller.rooms.log, event_id, caller.call)
    return IngestionView(event_id=event_id, status=report.state, memory_ids=list(report.memory_ids), reason=report.reason)


@router.post("/v1/memories/search")
async def search_memories(body: SearchBody, caller: MemoryReader) -> SearchView:
    """The best memories of your tenant, each with the parts of its score."""
    found = await memories.search(caller.rooms.log, body.query, caller.call, limit=body.limit, recall_filter=body.filter)
    return SearchView(data=[_memory_view(memory) for memory in found.memories], degraded=list(found.degraded))


async def _ingest(caller: Caller, item: Any, idempotency_key: str | None, index: int) -> AcceptedView:
    event_id = memories.item_id(caller.tenant_id, item.id, idempotency_key, index)
    rooms, accepted = caller.rooms, Item(event_of(item), event_id, item.subject_id)
    status = await memories.ingest(rooms.handoff, rooms.log, accepted, caller.call)
    consistency = ConsistencyView(token=f"event:{event_id}", status_url=f"/v1/ingest/{event_id}")
    return AcceptedView(event_id=event_id, status=status, consistency=consistency)


async def _result(caller: Caller, raw: Any, idempotency_key: str | None, index: int) -> BatchItemView | ApiError:
    """An ApiError only where the fault is ours; what is wrong with the item is its result."""
    try:
        item = ITEMS.validate_python(raw)
        accepted = await _ingest(caller, item, idempotency_key, index)
    except ValidationError as error:
        return _refused(index, of_validation(error.errors(), raw, prefix=f"items[{index}]."))
    except ApiError as error:
        return error if error.status >= 500 else _refused(index, error)
    return BatchItemView(index=index, status=accepted.status, event_id=accepted.event_id, consistency=accepted.consistency)


def _refused(index: int, error: ApiError) -> BatchItemView:
    return BatchItemView(index=index, status="refused", error=error.body()["error"])


def _failed(index: int, error: ApiError) -> BatchItemView:
    return BatchItemView(index=index, status="failed", error=error.body()["error"])


def _memory_view(memory: RecalledMemory) -> MemoryView:
    fields = memory.model_dump(mode="json", exclude={"memory_id", "text", "scores"})
    return MemoryView(id=memory.memory_id, text=opened(memory.text), scores=memory.scores, **fields)
