"""From pydantic's errors to OpenAI's code and param."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tessera.gateway.domain.errors import ApiError
from tessera.gateway.routes.schemas.generations import ChatCompletionBody, CompletionBody
from tessera.gateway.routes.schemas.memories import ITEMS
from tessera.gateway.routes.schemas.texts import DetokenizeBody, EmbeddingBody
from tessera.gateway.routes.validation import of_validation

pytestmark = pytest.mark.unit

HELLO = {"role": "user", "content": "Hello"}


def refusal(kind: Any, body: Any) -> ApiError:
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    with pytest.raises(ValidationError) as refused:
        adapter.validate_python(body)
    return of_validation(refused.value.errors(), body)


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [HELLO, {"content": "x"}]}, "missing_required_parameter", "messages[1].role"),
        ({"messages": [{**HELLO, "wat": 1}]}, "unknown_parameter", "messages[0].wat"),
        ({"messages": [{"role": "user", "content": 7}]}, "invalid_type", "messages[0].content"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"temperature": float("nan")}, "invalid_value", "temperature"),
        ({"top_p": -1}, "decimal_below_min_value", "top_p"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"seed": 2**70}, "integer_above_max_value", "seed"),
        ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
        ({"stop": ["a", ""]}, "string_below_min_length", "stop[1]"),
        ({"stop": ""}, "string_below_min_length", "stop"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
        ({"model": 7}, "invalid_type", "model"),
        ({"model": "x" * 200}, "string_above_max_length", "model"),
        ({"tessera": {"memory": {"limit": 51}}}, "integer_above_max_value", "tessera.memory.limit"),
        ({"nonsense": 1}, "unknown_parameter", "nonsense"),
        ({"logit_bias": {"1": 101}}, "decimal_above_max_value", "logit_bias.1"),
    ],
)
def test_a_chat_that_does_not_fit(more: dict[str, Any], code: str, param: str) -> None:
    error = refusal(ChatCompletionBody, {"model": "m", "messages": [HELLO], **more})
    assert (error.status, error.code, error.param) == (400, code, param)
    assert param in error.message


@pytest.mark.parametrize(
    ("kind", "body", "code", "param"),
    [
        (CompletionBody, {"model": "m"}, "missing_required_parameter", "prompt"),
        (CompletionBody, [], "invalid_type", None),
        (EmbeddingBody, {"model": "m", "input": ""}, "string_below_min_length", "input"),
        (EmbeddingBody, {"model": "m", "input": "x", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        (DetokenizeBody, {}, "invalid_value", None),
        (DetokenizeBody, {"tokens": [-1]}, "integer_below_min_value", "tokens[0]"),
        (
            ITEMS,
            {"type": "relation", "source_entity_id": "a", "relation": "r", "target_entity_id": "b", "weight": 2},
            "decimal_above_max_value",
            "weight",
        ),
        (
            ITEMS,
            {"type": "message", "conversation_id": "c", "role": "user", "content": "x" * 100_001},
            "string_above_max_length",
            "content",
        ),
        (ITEMS, {"type": "message", "conversation_id": "c", "role": "user"}, "missing_required_parameter", "content"),
        (ITEMS, {"conversation_id": "c"}, "missing_required_parameter", "type"),
        (ITEMS, {"type": "letter", "content": "x"}, "invalid_value", "type"),
        (ITEMS, "text", "invalid_type", None),
    ],
)
def test_other_bodies_that_do_not_fit(kind: Any, body: Any, code: str, param: str | None) -> None:
    error = refusal(kind, body)
    assert (error.code, error.param) == (code, param)
