"""`/v1/chat/completions` and `/v1/completions`."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from tessera.contracts import body_digest, uuid7
from tessera.contracts.events import CallerIdentity, Capability, GenerationRequested, ModelReference, StreamOptions
from tessera.gateway.domain import errors
from tessera.gateway.domain.answers import Answer, Form, StreamedAnswer
from tessera.gateway.domain.assembly import Ending
from tessera.gateway.domain.frames import FrameId, encode_json
from tessera.gateway.domain.limits import estimated_tokens, user_of
from tessera.gateway.domain.records import Since
from tessera.gateway.handlers import texts
from tessera.gateway.handlers.consistency import awaited
from tessera.gateway.handlers.generations import Generation, Keep, claimed, generation_id
from tessera.gateway.handlers.records import is_known
from tessera.gateway.handlers.stored import Keeper, begun
from tessera.gateway.ports import Claim
from tessera.gateway.routes.context import Caller, IdempotencyKey, Inference
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.consistency import read_view
from tessera.gateway.routes.schemas.generations import (
    ChatCompletionBody,
    ChatCompletionView,
    CompletionBody,
    CompletionView,
    GenerationBody,
)
from tessera.gateway.routes.streaming import EventStream, unless_disconnected

router = APIRouter(route_class=CarefulRoute, tags=["generation"])

LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", min_length=1, max_length=300, description="`id` of the last event that arrived: what follows it comes."),
]

STREAM: Final[dict[str, Any]] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Each event of the stream.",
            "required": ["data"],
            "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
        },
        "example": 'id: 0199.3.17.0\ndata: {"choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\ndata: [DONE]\n\n',
    }
}


@router.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletionView, "content": STREAM}})
async def create_chat_completion(
    body: ChatCompletionBody,
    request: Request,
    caller: Inference,
    idempotency_key: IdempotencyKey = None,
    last_event_id: LastEventId = None,
) -> Response:
    """Answer a chat, streamed or not. With `tessera.memory` the answer is grounded on recalled memories."""
    model = _model(caller, body, "chat")
    await _admit(request, caller, body)
    accepted = await _accepted(caller, body, model, idempotency_key, messages=body.checked_messages())
    asked = Asked("chat", idempotency_key is not None, _resumed(body, accepted, idempotency_key, last_event_id))
    return await _respond(request, caller, body, accepted, asked)


@router.post("/v1/completions", response_model=None, responses={200: {"model": CompletionView, "content": STREAM}})
async def create_completion(
    body: CompletionBody, request: Request, caller: Inference, idempotency_key: IdempotencyKey = None, last_event_id: LastEventId = None
) -> Response:
    """Continue a text, streamed or not."""
    model = _model(caller, body, "completion")
    await _admit(request, caller, body)
    prompt = body.one_prompt()
    if not isinstance(prompt, str):
        prompt = await texts.decode_given(caller.rooms.log, model.encoding, prompt, caller.call, param="prompt")
    accepted = await _accepted(caller, body, model, idempotency_key, prompt=prompt)
    asked = Asked("text", idempotency_key is not None, _resumed(body, accepted, idempotency_key, last_event_id))
    return await _respond(request, caller, body, accepted, asked)


@dataclass(frozen=True)
class Asked:
    """How a generation was asked for."""

    form: Form
    keyed: bool
    """With an Idempotency-Key."""
    after: FrameId | None
    """The last event that its reader has."""


def _resumed(body: GenerationBody, accepted: GenerationRequested, idempotency_key: str | None, last: str | None) -> FrameId | None:
    """Raises ApiError 400 for a Last-Event-ID that cannot be of this stream."""
    if last is None:
        return None
    place = FrameId.parse(last)
    if not body.streams or idempotency_key is None or place is None or place.generation_id != accepted.generation_id:
        raise errors.last_event_id_unknown()
    return place


def _model(caller: Caller, body: GenerationBody, capability: Capability) -> ModelReference:
    model = caller.rooms.models.offering(body.model, capability).declaration.model
    body.check(model)
    return model


async def _admit(request: Request, caller: Caller, body: GenerationBody) -> None:
    """Counts the request for the user it names, where the credential names none, and what it may use for everybody. Raises ApiError 429."""
    if caller.principal.user is None and (user := body.end_user()) is not None:
        await caller.rooms.gate.admit(caller.use, user_of(caller.tenant_id, user))
    await caller.rooms.gate.afford(caller.use)
    await caller.rooms.gate.reserve(caller.use, estimated_tokens(len(await request.body()), body.most_generated()))


async def _accepted(
    caller: Caller, body: GenerationBody, model: ModelReference, idempotency_key: str | None, **content: Any
) -> GenerationRequested:
    partition = caller.rooms.log.reply_partition
    return GenerationRequested(
        reply_partition=partition,
        reply_offset=await caller.rooms.log.next_offset(partition),
        accepted_at=datetime.now(UTC),
        generation_id=generation_id(caller.tenant_id, idempotency_key),
        model=model,
        parameters=body.parameters(),
        stream=body.streams,
        memory=body.grounding(),
        asked_model=body.model if body.model != model.model_id else None,
        stream_options=StreamOptions(include_usage=body.wants_usage, include_obfuscation=body.wants_obfuscation) if body.streams else None,
        caller=CallerIdentity(credential_id=caller.principal.key_id, user=caller.principal.user or body.end_user()),
        **content,
    )


async def _respond(request: Request, caller: Caller, body: GenerationBody, accepted: GenerationRequested, asked: Asked) -> Response:
    rooms = caller.rooms
    accepted, consistency = await unless_disconnected(request, _once_fresh(caller, body, accepted))
    claim = await claimed(rooms.generations, accepted, caller.call, _digest(asked.form, body)) if asked.keyed else None
    if claim is not None:
        accepted = _as_claimed(accepted, claim)
        if claim.first and asked.after is not None:
            raise errors.last_event_id_unknown()
    answer = Answer(
        asked.form,
        accepted.generation_id,
        accepted.model.model_id,
        _created(accepted),
        body.wants_usage,
        body.wants_obfuscation,
        consistency,
    )
    keeper = await _keeper(caller, body, answer, accepted)
    generation = Generation(
        rooms.log,
        accepted,
        caller.call,
        caller.generation_limits,
        claim=claim,
        finishes=_finishes(caller, body, asked),
        is_known=partial(is_known, rooms.records, rooms.log, caller.tenant_id, accepted.generation_id, claim.created_at) if claim else None,
        keep=_ended(caller, accepted.model.model_id, keeper, claim),
    )
    if not body.streams:
        return await unless_disconnected(request, _whole(generation, answer, keeper))
    async with AsyncExitStack() as held:
        await held.enter_async_context(rooms.gate.streaming(caller.use, uuid7().hex, caller.generation_limits.timeout))
        await _open(generation, keeper)
        return EventStream(generation, await _frames(generation, StreamedAnswer(answer), asked.after), held.pop_all())


def _as_claimed(accepted: GenerationRequested, claim: Claim) -> GenerationRequested:
    """With the moment and the place of the first: others who join repeat them."""
    since = claim.since
    first = {"reply_partition": since.partition, "reply_offset": since.offset, "accepted_at": claim.created_at}
    return accepted.model_copy(update=first)


def _created(accepted: GenerationRequested) -> int:
    return int(accepted.accepted_at.timestamp()) if accepted.accepted_at else 0


def _finishes(caller: Caller, body: GenerationBody, asked: Asked) -> bool:
    """Whether it goes on when its client leaves: as the request says, else as one that can be asked for again, else as the key says."""
    said = body.on_disconnect or ("finish" if asked.keyed else caller.principal.on_disconnect)
    return said == "finish"


async def _frames(generation: Generation, answer: StreamedAnswer, after: FrameId | None) -> AsyncIterator[bytes]:
    if after is None:
        return generation.frames(answer)
    try:
        return await generation.frames_after(answer, after)
    except BaseException:
        await generation.close()
        raise


def _ended(caller: Caller, model_id: str, keeper: Keeper | None, claim: Claim | None) -> Keep:
    """What is done with the end before anybody is given it. Who joins a generation has not used its tokens."""
    joined = claim is not None and not claim.first

    async def ended(ending: Ending) -> None:
        if keeper is not None:
            await keeper.keep(ending)
        if ending.usage is not None and not joined:
            cost = caller.rooms.prices.cost(model_id, ending.usage)
            await caller.rooms.gate.settle(caller.use, ending.usage.prompt_tokens + ending.usage.completion_tokens, cost)

    return ended


async def _keeper(caller: Caller, body: GenerationBody, answer: Answer, accepted: GenerationRequested) -> Keeper | None:
    """The row of a chat that is to be kept, before its event. Raises RetryableError where it cannot be written: nothing was begun then."""
    if not body.keeps:
        return None
    since = Since(accepted.reply_partition, accepted.reply_offset or 0)
    longest = caller.generation_limits.timeout
    return await begun(caller.rooms.stored, caller.tenant_id, answer, request=body.kept(), since=since, longest=longest)


async def _open(generation: Generation, keeper: Keeper | None) -> None:
    """Publishes. What could not be is closed, and not kept."""
    try:
        await generation.open()
    except BaseException:
        await generation.close()
        if keeper is not None:
            await keeper.forget()
        raise


async def _once_fresh(
    caller: Caller, body: GenerationBody, accepted: GenerationRequested
) -> tuple[GenerationRequested, dict[str, Any] | None]:
    """Waits until memory is as fresh as the body asks, and says how fresh it is. Raises ApiError where it is not in time.

    Nothing was begun then.
    """
    if accepted.memory is None or body.consistency is None:
        return accepted, None
    tokens, tenant_id = caller.rooms.tokens, caller.tenant_id
    fresh = body.consistency.fresh(tokens, tenant_id, caller.call.patience, param="tessera.memory.consistency")
    proved, freshness = await awaited(caller.rooms.log, fresh, caller.call)
    grounded = accepted.model_copy(update={"memory": accepted.memory.model_copy(update={"consistency": proved})})
    return grounded, read_view(fresh.wanted.level, freshness, tokens, tenant_id).model_dump()


def _digest(form: Form, body: GenerationBody) -> bytes:
    """What tells one body from another under the same Idempotency-Key."""
    return body_digest(encode_json([form, body.model_dump(mode="json", exclude_unset=True)]))


async def _whole(generation: Generation, answer: Answer, keeper: Keeper | None) -> Response:
    await _open(generation, keeper)
    try:
        completed = await generation.completed()
    finally:
        await generation.close()
    return Response(encode_json(answer.whole(completed)), media_type="application/json")
