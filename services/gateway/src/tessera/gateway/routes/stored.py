"""`/v1/chat/completions`, of those that were stored: list, get, messages, update, delete."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request

from tessera.gateway.domain.errors import ApiError, not_found
from tessera.gateway.ports import Stored, StoredPage
from tessera.gateway.routes.context import Caller, Inference
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.stored import (
    METADATA_PARAMETER,
    CompletionId,
    DeletedView,
    MetadataBody,
    StoredCompletionList,
    StoredCompletionView,
    StoredMessageList,
    StoredMessageView,
)

router = APIRouter(route_class=CarefulRoute, tags=["stored completions"])

_PREFIX: Final = "chatcmpl-"
_METADATA: Final = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_ALSO_KEPT: Final = ("messages", "metadata", "consistency")

Completion = Annotated[CompletionId, Path()]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query(description="By the time of the request.")]
After = Annotated[str | None, Query(min_length=1, max_length=300, description="`last_id` of the page before.")]


@router.get("/v1/chat/completions", openapi_extra={"parameters": [METADATA_PARAMETER]})
async def list_stored_completions(
    request: Request,
    caller: Inference,
    *,
    model: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> StoredCompletionList:
    """Chats that were stored (`store: true`)."""
    last = None if after is None else _generation(after)
    wanted = StoredPage(limit + 1, order == "desc", last, model, _metadata(request))
    found = await caller.rooms.stored.page(caller.tenant_id, wanted)
    if found is None:
        raise _unknown(after or "")
    page = [_view(stored) for stored in found[:limit]]
    return StoredCompletionList(data=page, **_ends([view.id for view in page]), has_more=len(found) > limit)


@router.get("/v1/chat/completions/{completion_id}")
async def retrieve_stored_completion(completion_id: Completion, caller: Inference) -> StoredCompletionView:
    """One that was stored."""
    return _view(await _found(caller, completion_id))


@router.get("/v1/chat/completions/{completion_id}/messages")
async def list_stored_messages(
    completion_id: Completion, caller: Inference, *, after: After = None, limit: Limit = 20, order: Order = "asc"
) -> StoredMessageList:
    """The messages of its request."""
    stored = await _found(caller, completion_id)
    messages = [_message(completion_id, index, message) for index, message in enumerate(json.loads(stored.request)["messages"])]
    if order == "desc":
        messages.reverse()
    rest = _after(messages, after)
    page = rest[:limit]
    return StoredMessageList(data=page, **_ends([message.id for message in page]), has_more=len(rest) > limit)


@router.post("/v1/chat/completions/{completion_id}")
async def update_stored_completion(completion_id: Completion, body: MetadataBody, caller: Inference) -> StoredCompletionView:
    """Replace its metadata."""
    stored = await caller.rooms.stored.label(caller.tenant_id, _generation(completion_id), body.metadata or {})
    if stored is None:
        raise _unknown(completion_id)
    return _view(stored)


@router.delete("/v1/chat/completions/{completion_id}")
async def delete_stored_completion(completion_id: Completion, caller: Inference) -> DeletedView:
    """Forget it."""
    if not await caller.rooms.stored.delete(caller.tenant_id, _generation(completion_id)):
        raise _unknown(completion_id)
    return DeletedView(id=completion_id)


async def _found(caller: Caller, completion_id: str) -> Stored:
    stored = await caller.rooms.stored.find(caller.tenant_id, _generation(completion_id))
    if stored is None:
        raise _unknown(completion_id)
    return stored


def _generation(completion_id: str) -> str:
    """The generation's id. Raises ApiError 404 for what can be no completion's."""
    if not completion_id.startswith(_PREFIX):
        raise _unknown(completion_id)
    return completion_id.removeprefix(_PREFIX)


def _unknown(completion_id: str) -> ApiError:
    return not_found("completion_not_found", f"The stored completion '{completion_id}'")


def _metadata(request: Request) -> dict[str, str]:
    """The pairs that are asked for, as the SDKs send them. Raises ApiError 400 for `metadata` in any other form."""
    pairs = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata"):
            continue
        pair = _METADATA.fullmatch(name)
        if pair is None or len(value) > METADATA_PARAMETER["schema"]["additionalProperties"]["maxLength"]:
            raise ApiError(400, "invalid_value", "Invalid 'metadata': expected pairs such as 'metadata[topic]=keys'.", param="metadata")
        pairs[pair[1]] = value
    return pairs


def _view(stored: Stored) -> StoredCompletionView:
    parameters = {name: value for name, value in json.loads(stored.request).items() if name not in _ALSO_KEPT}
    answer: dict[str, Any] = json.loads(stored.answer or "{}")
    return StoredCompletionView(**{**parameters, **answer, "metadata": dict(stored.metadata)})


def _message(completion_id: str, index: int, message: dict[str, Any]) -> StoredMessageView:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = None if parts is not None else content
    return StoredMessageView(**{**message, "id": f"{completion_id}-{index}", "content": text, "content_parts": parts})


def _after(messages: Sequence[StoredMessageView], last: str | None) -> Sequence[StoredMessageView]:
    """Those that follow `last`. Raises ApiError 404 where it is none of them."""
    if last is None:
        return messages
    place = next((at for at, message in enumerate(messages) if message.id == last), None)
    if place is None:
        raise not_found("message_not_found", f"The message '{last}'")
    return messages[place + 1 :]


def _ends(ids: Sequence[str]) -> dict[str, str | None]:
    return {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
