from typing import Any

import pytest
from pydantic import ValidationError

from tessera.contracts import (
    EVENT_TYPES,
    GenerationRequested,
    MessagePublished,
    Problem,
    RelationPublished,
    RetentionPolicy,
    RetryableError,
    Sealed,
    TokenizationRequested,
    opened,
)
from tessera.contracts.base import MAXIMUM_CONTENT_CHARACTERS
from tessera.contracts.errors import InvalidError

pytestmark = pytest.mark.unit

MESSAGE = {"conversation_id": "c", "role": "user", "content": "Hello."}


def _field_of(error: ValidationError) -> str:
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"contnet": "x"}, "contnet"),
        ({"role": "robot"}, "role"),
        ({"content": ""}, "content"),
        ({"content": "a\x00b"}, "content"),
        ({"content": "x" * (MAXIMUM_CONTENT_CHARACTERS + 1)}, "content"),
        ({"content": 7}, "content"),
        ({"conversation_id": "x" * 129}, "conversation_id"),
        ({"importance": 1.5}, "importance"),
        ({"importance": float("nan")}, "importance"),
        ({"occurred_at": "2026-01-01T00:00:00"}, "occurred_at"),
        ({"metadata": {"a": "x" * 17_000}}, "metadata"),
        ({"metadata": _nested(9)}, "metadata"),
        ({"metadata": [1]}, "metadata"),
    ],
)
def test_a_bad_message_is_refused_at_the_field_that_is_wrong(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MessagePublished.model_validate({**MESSAGE, **change})
    assert _field_of(caught.value).split(".")[0] == field


def test_limits_are_inclusive() -> None:
    message = MessagePublished.model_validate({**MESSAGE, "content": "x" * MAXIMUM_CONTENT_CHARACTERS, "metadata": _nested(8)})
    assert len(opened(message.content)) == MAXIMUM_CONTENT_CHARACTERS


def test_a_reader_accepts_what_it_does_not_know() -> None:
    message = MessagePublished.model_validate({**MESSAGE, "new_field": 1}, extra="ignore")
    assert not hasattr(message, "new_field")


def test_moments_are_written_in_utc() -> None:
    message = MessagePublished.model_validate({**MESSAGE, "occurred_at": "2026-01-01T01:00:00+01:00"})
    assert message.model_dump(mode="json")["occurred_at"] == "2026-01-01T00:00:00Z"


def test_sealed_content_is_understood_but_not_opened() -> None:
    message = MessagePublished.model_validate({**MESSAGE, "content": {"key_id": "k", "nonce": "bg==", "ciphertext": "Yw=="}})
    assert isinstance(message.content, Sealed)
    with pytest.raises(InvalidError) as caught:
        opened(message.content)
    assert caught.value.code == "sealed_content"


def test_validity_must_be_in_order() -> None:
    with pytest.raises(ValidationError, match="before valid_from"):
        RelationPublished.model_validate(
            {
                "source_entity_id": "a",
                "relation": "r",
                "target_entity_id": "b",
                "valid_from": "2026-01-02T00:00:00Z",
                "valid_to": "2026-01-01T00:00:00Z",
            }
        )


@pytest.mark.parametrize("given", [{}, {"text": "a", "tokens": [1]}, {"text": "a", "composition_id": "0" * 64}])
def test_tokenization_takes_exactly_one_input(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        TokenizationRequested.model_validate({"reply_partition": 0, "encoding": "o200k_base", **given})


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}])
def test_a_generation_takes_messages_or_a_prompt(given: dict[str, Any]) -> None:
    model = {"model_id": "m", "provider": "p", "capability": "chat", "encoding": "e", "template": "t", "exact": True}
    with pytest.raises(ValidationError, match="exactly one"):
        GenerationRequested.model_validate({"reply_partition": 0, "generation_id": "g", "model": model, **given})


def test_a_policy_needs_a_rule() -> None:
    with pytest.raises(ValidationError, match="max_age_days"):
        RetentionPolicy.model_validate({})


def test_every_type_is_named_as_the_rules_say() -> None:
    for event_type in EVENT_TYPES:
        prefix, noun, verb, version = event_type.split(".")
        assert prefix == "tessera"
        assert noun.isidentifier()
        assert verb.isidentifier()
        assert version[0] == "v"
        assert int(version[1:]) >= 1


def test_a_problem_tells_code_message_and_field() -> None:
    assert Problem.of(InvalidError("too_large", "Too large.", "content")).param == "content"
    assert Problem.of(RetryableError("later"), status=503) == Problem(code="temporarily_unavailable", message="later", status=503)
