"""How many tokens a prompt has under its model's declaration, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import JsonValue

from tessera.contracts.errors import InvalidError
from tessera.contracts.events import ChatMessage, GenerationRequested, PromptTokens
from tessera.contracts.sealing import Sealed, opened
from tessera.encodings import Encoding, EncodingsError, PromptMessage, count_prompt

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


def counted(request: GenerationRequested, encoding: Encoding) -> PromptTokens:
    """The prompt's tokens. `source` is "counted" only where the declared encoding is the model's own and all content is text.

    Raises InvalidError: `context_length_exceeded`, `sealed_content`, `messages_not_supported`, or what the encodings refuse.
    """
    try:
        count = count_prompt(_prompt(request), encoding, request.model.template)
    except EncodingsError as error:
        raise InvalidError(error.code, str(error), _field(request)) from error
    count += encoding.count(_tools(request))
    _require_room(request, count)
    return PromptTokens(count=count, source="counted" if _is_exact(request) else "estimated")


def _prompt(request: GenerationRequested) -> str | Sequence[PromptMessage]:
    if request.prompt is not None:
        return opened(request.prompt)
    return [PromptMessage(message.role, _text(message), message.name) for message in request.messages or ()]


def _text(message: ChatMessage) -> str:
    """What of a message can be counted: its text, the texts of its parts, and its calls of tools as JSON."""
    calls = _json(list(message.tool_calls)) if message.tool_calls else ""
    content = message.content
    if content is None:
        return calls
    if isinstance(content, str | Sealed):
        return opened(content) + calls
    return "".join(_part_text(part) for part in content) + calls


def _part_text(part: dict[str, JsonValue]) -> str:
    text = part.get("text") if part.get("type") == "text" else None
    return text if isinstance(text, str) else ""


def _tools(request: GenerationRequested) -> str:
    tools = request.parameters.extra.get("tools")
    return _json(tools) if tools else ""


def _json(value: JsonValue | list[dict[str, JsonValue]]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_exact(request: GenerationRequested) -> bool:
    """How providers count tools, calls of them, and parts that are not text is not published."""
    return request.model.exact and not _tools(request) and all(_is_plain(message) for message in request.messages or ())


def _is_plain(message: ChatMessage) -> bool:
    parts = message.content if isinstance(message.content, tuple) else ()
    return not message.tool_calls and message.tool_call_id is None and all(part.get("type") == "text" for part in parts)


def _require_room(request: GenerationRequested, count: int) -> None:
    limit, asked = request.model.context_tokens, request.parameters.max_tokens
    if limit is None or count + (asked or 1) <= limit:
        return
    completion = f" and max_tokens asks for {asked}" if asked else ""
    message = f"The context of {request.model.model_id} is {limit} tokens; the prompt has {count}{completion}."
    raise InvalidError(CONTEXT_LENGTH_EXCEEDED, message, _field(request))


def _field(request: GenerationRequested) -> str:
    return "prompt" if request.messages is None else "messages"
