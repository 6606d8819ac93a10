"""Stored completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tessera.gateway.routes.schemas.common import Body, Metadata, Object, View, examples
from tessera.gateway.routes.schemas.generations import ChatCompletionView

CompletionId = Annotated[str, Field(min_length=1, max_length=256, examples=["chatcmpl-019a2b3c-0000-7000-8000-000000000001"])]


class StoredCompletionView(ChatCompletionView):
    """An answer that was kept, with the parameters of its request and its metadata."""

    metadata: Metadata


class StoredCompletionList(View):
    """One page; go on with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[StoredCompletionView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoredMessageView(View):
    """A message of the request; `content_parts` where the content was not plain text."""

    id: str
    role: str
    content: str | None
    content_parts: list[Object] | None


class StoredMessageList(View):
    """One page of messages; go on with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[StoredMessageView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MetadataBody(Body):
    """`POST /v1/chat/completions/{completion_id}`."""

    model_config = examples({"metadata": {"reviewed": "yes"}})

    metadata: Annotated[Metadata | None, Field(description="Takes the place of what was there; null removes it.")]


class DeletedView(View):
    """What was deleted."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True


METADATA_PARAMETER: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "Only those with these pairs: `metadata[topic]=keys`.",
    "schema": {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 512}},
}
