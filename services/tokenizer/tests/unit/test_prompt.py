"""Counting of prompts."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.contracts.errors import InvalidError
from tessera.contracts.events import GenerationRequested
from tessera.encodings import encoding
from tessera.tokenizer.domain.prompt import counted

pytestmark = pytest.mark.unit

O200K = encoding("o200k_base")


def request(*, model: dict[str, Any] | None = None, **fields: Any) -> GenerationRequested:
    declared = {
        "model_id": "m",
        "provider": "p",
        "capability": "chat",
        "encoding": "o200k_base",
        "template": "openai-chat",
        "exact": True,
        **(model or {}),
    }
    if "prompt" not in fields:
        fields.setdefault("messages", [{"role": "user", "content": "hello world"}])
    return GenerationRequested.model_validate({"reply_partition": 0, "generation_id": "g", "model": declared, **fields})


def test_text_is_counted() -> None:
    found = counted(request(), O200K)
    assert (found.count, found.source) == (3 + 1 + 2 + 3, "counted")


def test_a_completion_prompt_is_counted_as_text() -> None:
    assert counted(request(prompt="hello world", model={"template": "text"}), O200K).count == 2


def test_an_inexact_declaration_is_an_estimate() -> None:
    assert counted(request(model={"exact": False}), O200K).source == "estimated"


def test_text_parts_count_like_text() -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": " world"}]
    found = counted(request(messages=[{"role": "user", "content": parts}]), O200K)
    assert (found.count, found.source) == (9, "counted")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]},
        {"messages": [{"role": "tool", "content": "42", "tool_call_id": "1"}]},
        {"parameters": {"extra": {"tools": [{"type": "function", "function": {"name": "f"}}]}}},
    ],
)
def test_what_providers_do_not_publish_is_an_estimate(fields: dict[str, Any]) -> None:
    found = counted(request(**fields), O200K)
    assert found.source == "estimated"
    assert found.count > 6


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    assert counted(request(model={"context_tokens": 10}), O200K).count == 9
    with pytest.raises(InvalidError, match="is 9 tokens; the prompt has 9") as caught:
        counted(request(model={"context_tokens": 9}), O200K)
    assert (caught.value.code, caught.value.field) == ("context_length_exceeded", "messages")


def test_max_tokens_must_fit_too() -> None:
    assert counted(request(model={"context_tokens": 19}, parameters={"max_tokens": 10}), O200K).count == 9
    with pytest.raises(InvalidError, match="max_tokens asks for 11") as caught:
        counted(request(model={"context_tokens": 19}, parameters={"max_tokens": 11}), O200K)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": {"template": "text"}}, "messages_not_supported"),
        ({"model": {"template": "chatml"}}, "unknown_template"),
        ({"prompt": {"key_id": "k", "nonce": "n", "ciphertext": "c"}}, "sealed_content"),
        ({"messages": [{"role": "user", "content": {"key_id": "k", "nonce": "n", "ciphertext": "c"}}]}, "sealed_content"),
    ],
)
def test_what_cannot_be_counted_is_refused(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidError) as caught:
        counted(request(**fields), O200K)
    assert caught.value.code == code
