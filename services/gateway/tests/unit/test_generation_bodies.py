"""Which fields of the published API are honoured, handed on, or refused."""

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from pydantic import TypeAdapter

from tessera.contracts.events import ModelReference
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.routes.schemas.generations import ChatCompletionBody, CompletionBody

pytestmark = pytest.mark.unit

HELLO = [{"role": "user", "content": "Hello"}]


def model(provider: str) -> ModelReference:
    return ModelReference(model_id="m", provider=provider, capability="chat", encoding="e", template="t", exact=True)


def chat(**more: Any) -> ChatCompletionBody:
    return TypeAdapter(ChatCompletionBody).validate_python({"model": "m", "messages": HELLO, **more})


def text(**more: Any) -> CompletionBody:
    return TypeAdapter(CompletionBody).validate_python({"model": "m", "prompt": "Once", **more})


def test_every_field_of_the_published_api_is_known() -> None:
    assert set(ChatParams.__annotations__) <= set(ChatCompletionBody.model_fields)
    assert set(TextParams.__annotations__) <= set(CompletionBody.model_fields)


@pytest.mark.parametrize(
    "more",
    [
        {"audio": {"voice": "x"}},
        {"modalities": ["audio"]},
        {"moderation": {}},
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 1, "max_completion_tokens": 1},
    ],
)
def test_what_nobody_can_honour_is_refused_by_name(more: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**more).check(model("openai"))
    assert (refused.value.status, refused.value.code) == (400, "unsupported_parameter")
    assert refused.value.param in more


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"frequency_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}], "tool_choice": "required"},
        {"logit_bias": {"1": 1}},
        {"logprobs": True, "top_logprobs": 3},
        {"reasoning_effort": "high"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}},
    ],
)
def test_what_a_local_engine_cannot_honour_is_handed_to_a_remote_provider(more: dict[str, Any]) -> None:
    body = chat(**more)
    body.check(model("openai"))
    assert body.parameters().extra == more
    with pytest.raises(ApiError) as refused:
        body.check(model("local"))
    assert refused.value.param in more


def test_values_that_ask_for_nothing_and_hints_are_accepted_everywhere() -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "store": False,
        "modalities": ["text"],
        "frequency_penalty": 0,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "user": "u",
        "metadata": {},
        "parallel_tool_calls": None,
        "temperature": None,
        "stop": None,
        "stream": None,
    }
    chat(**neutral).check(model("local"))


def test_parameters_travel() -> None:
    given = chat(max_completion_tokens=3, temperature=0, top_p=1, stop="x", seed=-1).parameters()
    assert (given.max_tokens, given.temperature, given.top_p, given.stop, given.seed, given.extra) == (3, 0, 1, ("x",), -1, {})


def test_grounding_only_where_it_is_asked_for() -> None:
    assert chat().grounding() is None
    assert chat(tessera={}).grounding() is None
    grounding = chat(tessera={"memory": {"conversation_id": "c"}}).grounding()
    assert grounding is not None
    assert (grounding.limit, grounding.conversation_id) == (5, "c")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
    ],
)
def test_a_message_that_cannot_be_carried(message: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(messages=[message]).checked_messages()
    assert refused.value.param == param


def test_messages_travel_with_parts_and_tool_calls() -> None:
    messages = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "tool_calls": [{"id": "1"}], "refusal": None},
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "assistant", "refusal": "No."},
            {"role": "tool", "content": "done", "tool_call_id": "1"},
        ]
    ).checked_messages()
    assert messages[0].content == ({"type": "text", "text": "hi"},)
    assert (messages[1].content, messages[1].tool_calls) == (None, ({"id": "1"},))
    assert (messages[2].function_call, messages[3].refusal) == ({"name": "f", "arguments": "{}"}, "No.")
    assert messages[4].tool_call_id == "1"


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [], [[]], [-1]])
def test_a_prompt_that_is_not_one(prompt: Any) -> None:
    with pytest.raises(Exception, match=r"one prompt|at least 1|greater than or equal"):
        text(prompt=prompt).one_prompt()


@pytest.mark.parametrize(("prompt", "one"), [("Once", "Once"), (["Once"], "Once"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])])
def test_one_prompt_however_it_is_given(prompt: Any, one: Any) -> None:
    assert text(prompt=prompt).one_prompt() == one


@pytest.mark.parametrize(
    "more", [{"echo": True}, {"best_of": 2}, {"suffix": "."}, {"logprobs": 0}, {"logprobs": 5}, {"n": 2}, {"n": 2, "best_of": 2}]
)
def test_what_a_completion_asks_of_a_remote_provider(more: dict[str, Any]) -> None:
    body = text(**more)
    body.check(model("openai"))
    given = body.parameters()
    assert {"n": given.n, **given.extra} == {"n": None, **more}
    with pytest.raises(ApiError) as refused:
        body.check(model("local"))
    assert (refused.value.code, refused.value.param in more) == ("unsupported_parameter", True)


@pytest.mark.parametrize("more", [{"best_of": 2, "stream": True}, {"best_of": 1, "n": 2}])
def test_the_best_of_several_has_its_rules(more: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        text(**more).check(model("openai"))
    assert (refused.value.status, refused.value.param) == (400, "best_of")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_what_means_nothing_alone(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**more).check(model("openai"))
    assert (refused.value.status, refused.value.param) == (400, param)


def test_an_image_is_not_passed_over_by_an_engine_that_reads_text() -> None:
    parts = [{"type": "text", "text": "What is that?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    body = chat(messages=[*HELLO, {"role": "user", "content": parts}])
    body.check(model("openai"))
    with pytest.raises(ApiError) as refused:
        body.check(model("local"))
    assert refused.value.param == "messages[1].content[1]"
