"""`/v1/chat/completions` and `/v1/completions`."""

import time
from contextlib import AsyncExitStack
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from tessera.contracts import body_digest, uuid7
from tessera.contracts.events import Capability, GenerationRequested, ModelReference
from tessera.gateway.domain.answers import Answer, Form, StreamedAnswer
from tessera.gateway.domain.assembly import Ending
from tessera.gateway.domain.frames import encode_json
from tessera.gateway.domain.limits import estimated_tokens, user_of
from tessera.gateway.handlers import texts
from tessera.gateway.handlers.consistency import awaited
from tessera.gateway.handlers.generations import Generation, Keep, claimed, generation_id
from tessera.gateway.handlers.stored import Keeper, begun
from tessera.gateway.ports import Claim, Since
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

_STREAM: Final[dict[str, Any]] = {
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


@router.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletionView, "content": _STREAM}})
async def create_chat_completion(
    body: ChatCompletionBody, request: Request, caller: Inference, idempotency_key: IdempotencyKey = None
) -> Response:
    """Answer a chat, streamed or not. With `tessera.memory` the answer is grounded on recalled memories."""
    model = _model(caller, body, "chat")
    await _admit(request, caller, body)
    accepted = _accepted(caller, body, model, idempotency_key, messages=body.checked_messages())
    return await _respond(request, caller, body, accepted, form="chat", keyed=idempotency_key is not None)


@router.post("/v1/completions", response_model=None, responses={200: {"model": CompletionView, "content": _STREAM}})
async def create_completion(body: CompletionBody, request: Request, caller: Inference, idempotency_key: IdempotencyKey = None) -> Response:
    """Continue a text, streamed or not."""
    model = _model(caller, body, "completion")
    await _admit(request, caller, body)
    prompt = body.one_prompt()
    if not isinstance(prompt, str):
        prompt = await texts.decode_given(caller.rooms.log, model.encoding, prompt, caller.call, param="prompt")
    accepted = _accepted(caller, body, model, idempotency_key, prompt=prompt)
    return await _respond(request, caller, body, accepted, form="text", keyed=idempotency_key is not None)


def _model(caller: Caller, body: GenerationBody, capability: Capability) -> ModelReference:
    model = caller.rooms.models.offering(body.model, capability).declaration.model
    body.check(model)
    return model


async def _admit(request: Request, caller: Caller, body: GenerationBody) -> None:
    """Counts the request for the user it names, where the credential names none, and what it may use for everybody. Raises ApiError 429."""
    if caller.principal.user is None and (user := body.end_user()) is not None:
        await caller.rooms.gate.admit(caller.use, user_of(caller.tenant_id, user))
    await caller.rooms.gate.reserve(caller.use, estimated_tokens(len(await request.body()), body.most_generated()))


def _accepted(
    caller: Caller, body: GenerationBody, model: ModelReference, idempotency_key: str | None, **content: Any
) -> GenerationRequested:
    return GenerationRequested(
        reply_partition=caller.rooms.log.reply_partition,
        generation_id=generation_id(caller.tenant_id, idempotency_key),
        model=model,
        parameters=body.parameters(),
        stream=body.streams,
        memory=body.grounding(),
        **content,
    )


async def _respond(
    request: Request, caller: Caller, body: GenerationBody, accepted: GenerationRequested, *, form: Form, keyed: bool
) -> Response:
    rooms = caller.rooms
    accepted, consistency = await unless_disconnected(request, _once_fresh(caller, body, accepted))
    claim = await claimed(rooms.generations, rooms.log, accepted, caller.call, _digest(form, body)) if keyed else None
    if claim is not None:
        accepted = accepted.model_copy(update={"reply_partition": claim.since.partition})
    created = int(claim.created_at.timestamp() if claim else time.time())
    answer = Answer(form, accepted.generation_id, body.model, created, body.wants_usage, body.wants_obfuscation, consistency)
    keeper = await _keeper(caller, body, answer, accepted, claim)
    generation = Generation(rooms.log, accepted, caller.call, rooms.generation, claim=claim, keep=_ended(caller, keeper, claim))
    if not body.streams:
        return await unless_disconnected(request, _whole(generation, answer, keeper))
    async with AsyncExitStack() as held:
        await held.enter_async_context(rooms.gate.streaming(caller.use, uuid7().hex, rooms.generation.timeout))
        await _open(generation, keeper)
        return EventStream(generation, generation.frames(StreamedAnswer(answer)), held.pop_all())


def _ended(caller: Caller, keeper: Keeper | None, claim: Claim | None) -> Keep:
    """What is done with the end before anybody is given it. Who joins a generation has not used its tokens."""
    joined = claim is not None and not claim.first

    async def ended(ending: Ending) -> None:
        if keeper is not None:
            await keeper.keep(ending)
        if ending.usage is not None and not joined:
            await caller.rooms.gate.settle(caller.use, ending.usage.prompt_tokens + ending.usage.completion_tokens)

    return ended


async def _keeper(
    caller: Caller, body: GenerationBody, answer: Answer, accepted: GenerationRequested, claim: Claim | None
) -> Keeper | None:
    """The row of a chat that is to be kept, before its event. Raises RetryableError where it cannot be written: nothing was begun then."""
    if not body.keeps:
        return None
    partition, rooms = accepted.reply_partition, caller.rooms
    since = claim.since if claim else Since(partition, await rooms.log.next_offset(partition))
    return await begun(rooms.stored, caller.tenant_id, answer, request=body.kept(), since=since, longest=rooms.generation.timeout)


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
