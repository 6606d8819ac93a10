"""`/v1/generations`: what became of them, their streams read again, and an end to one."""

import json
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Path, Query
from starlette.responses import Response, StreamingResponse

from tessera.contracts import uuid7
from tessera.gateway.domain import errors
from tessera.gateway.domain.answers import Answer, StreamedAnswer
from tessera.gateway.domain.errors import ApiError, not_found
from tessera.gateway.domain.frames import FrameId
from tessera.gateway.domain.records import GenerationRecord, Status
from tessera.gateway.handlers.generations import Following, cancel
from tessera.gateway.handlers.records import found
from tessera.gateway.ports import RecordPage
from tessera.gateway.routes.context import Caller, Inference
from tessera.gateway.routes.generations import STREAM, LastEventId
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.records import FailureView, GenerationId, GenerationList, GenerationView, RecordUsageView
from tessera.gateway.routes.streaming import EventStream

router = APIRouter(route_class=CarefulRoute, tags=["generations"])

_PREFIXES: Final = ("chatcmpl-", "cmpl-")

Generation = Annotated[GenerationId, Path(description="The generation's id, or that of its answer (`chatcmpl-…`, `cmpl-…`).")]


@router.get("/v1/generations")
async def list_generations(
    caller: Inference,
    *,
    model: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    key_id: Annotated[str | None, Query(min_length=1, max_length=128, description="The key that asked.")] = None,
    status: Annotated[Status | None, Query()] = None,
    after: Annotated[str | None, Query(min_length=1, max_length=300, description="`last_id` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time of the request.")] = "desc",
) -> GenerationList:
    """Generations of your tenant, without their content, for as long as they are remembered."""
    wanted = RecordPage(limit + 1, order == "desc", after and _generation(after), model, key_id, status)
    page = await caller.rooms.records.page(caller.tenant_id, wanted)
    if page is None:
        raise not_found("generation_not_found", f"The generation '{after}'")
    data = [_view(record) for record in page[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return GenerationList(data=data, first_id=first, last_id=last, has_more=len(page) > limit)


@router.get("/v1/generations/{generation_id}")
async def retrieve_generation(generation_id: Generation, caller: Inference) -> GenerationView:
    """What became of one: it runs, or how it ended and what it used."""
    return _view(await _found(caller, generation_id))


@router.post("/v1/generations/{generation_id}/cancel", status_code=202)
async def cancel_generation(generation_id: Generation, caller: Inference) -> GenerationView:
    """Have it stopped, wherever it runs. One that has ended stays as it is."""
    record = await _found(caller, generation_id)
    if record.ended is None:
        await cancel(caller.rooms.log, record.id, caller.call, "client_request")
    return _view(record)


@router.get(
    "/v1/generations/{generation_id}/events",
    response_model=None,
    response_class=StreamingResponse,
    responses={200: {"content": STREAM}},
)
async def stream_generation(generation_id: Generation, caller: Inference, last_event_id: LastEventId = None) -> Response:
    """Its stream again, from the beginning or from behind `Last-Event-ID`, on any replica, while it runs and after its end.

    Also of a generation that was not asked for as a stream: then the answer comes in one piece. Leaving does not cancel.
    """
    record = await _found(caller, generation_id)
    after = _place(record, last_event_id)
    if record.since is None:
        raise ApiError(410, "stream_expired", "Where the stream of this generation began is not known.")
    following = Following(caller.rooms.log, record.id, caller.generation_limits)
    async with AsyncExitStack() as held:
        await held.enter_async_context(caller.rooms.gate.streaming(caller.use, uuid7().hex, caller.generation_limits.timeout))
        held.push_async_callback(following.close)
        await following.listen(record.since)
        answer = StreamedAnswer(_answer(record))
        frames = following.frames(answer) if after is None else await following.frames_after(answer, after)
        return EventStream(following, frames, held.pop_all())


async def _found(caller: Caller, generation_id: str) -> GenerationRecord:
    rooms, name = caller.rooms, _generation(generation_id)
    return await found(rooms.records, rooms.log, caller.tenant_id, name, partial(rooms.generations.claimed_at, caller.tenant_id, name))


def _generation(name: str) -> str:
    """The id of the generation behind that of an answer."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _place(record: GenerationRecord, last_event_id: str | None) -> FrameId | None:
    """Raises ApiError 400 for what is the id of no event of this stream."""
    if last_event_id is None:
        return None
    place = FrameId.parse(last_event_id)
    if place is None or place.generation_id != record.id:
        raise errors.last_event_id_unknown()
    return place


def _answer(record: GenerationRecord) -> Answer:
    form: Literal["chat", "text"] = "chat" if record.capability == "chat" else "text"
    created = int(record.accepted_at.timestamp())
    return Answer(form, record.id, record.model_id, created, record.include_usage, record.include_obfuscation)


def _view(record: GenerationRecord) -> GenerationView:
    ended = record.ended
    problem = None if ended is None or ended.problem is None else json.loads(ended.problem)
    return GenerationView(
        id=record.id,
        status=record.status,
        model=record.asked_model,
        served_model=record.model_id,
        capability=record.capability,
        stream=record.streamed,
        key_id=record.credential_id,
        user=record.user,
        created_at=record.accepted_at,
        ended_at=ended and ended.at,
        finish_reason=ended and ended.finish_reason,
        usage=_usage(record),
        error=problem and FailureView(code=problem["code"], message=problem["message"]),
    )


def _usage(record: GenerationRecord) -> RecordUsageView | None:
    ended = record.ended
    if ended is None or ended.prompt_tokens is None or ended.completion_tokens is None:
        return None
    return RecordUsageView(
        prompt_tokens=ended.prompt_tokens,
        completion_tokens=ended.completion_tokens,
        total_tokens=ended.prompt_tokens + ended.completion_tokens,
        source=ended.usage_source,
        cost=None if ended.cost is None else float(ended.cost),
    )
