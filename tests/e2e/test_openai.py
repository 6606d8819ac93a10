"""The official SDK, unmodified, over the whole platform: each field of the published requests, each error, a provider behind it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from upstream import CHAT, COMPLETION, Upstream, ended, said, usage

from tessera.encodings import encoding
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

HELLO: Any = [{"role": "user", "content": "Hello"}]
TOKEN = {"token": "Hi", "bytes": [72, 105], "logprob": -0.1, "top_logprobs": [{"token": "Hi", "bytes": [72, 105], "logprob": -0.1}]}
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{platform.url}/v1", api_key=platform.admin_key, max_retries=0) as made:
        yield made


# --- what a provider can do comes through ------------------------------------------------------------------------------


def test_several_choices_with_log_probabilities(client: openai.OpenAI, upstream: Upstream) -> None:
    upstream.says(said("No", 1), said("Hi", logprobs={"content": [TOKEN], "refusal": None}), ended("length", 1), ended("stop"), usage(7, 4))
    asked: Any = {"model": CHAT, "messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in whole.choices] == [
        (0, "Hi", "stop"),
        (1, "No", "length"),
    ]
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].token == "Hi"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 4)
    parts = list(client.chat.completions.create(**asked, stream=True))
    said_by = {index: "" for index in (0, 1)}
    for choice in (choice for part in parts for choice in part.choices):
        said_by[choice.index] += choice.delta.content or ""
    assert said_by == {0: "Hi", 1: "No"}
    assert [choice.logprobs.content[0].token for part in parts for choice in part.choices if choice.logprobs] == ["Hi"]
    assert {choice.index: choice.finish_reason for part in parts for choice in part.choices} == {0: "stop", 1: "length"}
    assert {name: upstream.requests[-1][name] for name in ("n", "logprobs", "top_logprobs")} == {
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
    }


def test_tools_are_called_in_a_stream_and_whole(client: openai.OpenAI, upstream: Upstream) -> None:
    begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"where"', ': "here"}')]
    other = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    deltas = [{"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]} for call in (begun, *more, other)]
    upstream.says(*deltas, ended("tool_calls"), usage(5, 9))
    asked: Any = {"model": CHAT, "messages": HELLO, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    calls: Any = whole.choices[0].message.tool_calls
    assert [(call.id, call.function.arguments) for call in calls] == [("call_1", '{"where": "here"}'), ("call_2", "{}")]
    assert "index" not in calls[0].model_dump()
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    streamed: Any = final.choices[0].message.tool_calls
    assert [(call.id, call.function.arguments) for call in streamed] == [("call_1", '{"where": "here"}'), ("call_2", "{}")]
    sent = upstream.requests[-1]
    assert (sent["tools"], sent["tool_choice"], sent["parallel_tool_calls"]) == (TOOLS, "required", True)


def test_a_stop_sequence_across_chunks_and_characters(client: openai.OpenAI, upstream: Upstream) -> None:
    upstream.says(said("One 世"), said("界 👋E"), said("N"), said("D and more"), ended("length"), usage(1, 9))
    asked: Any = {"model": CHAT, "messages": HELLO, "stop": ["never", "👋END", "x", "\n"]}
    whole = client.chat.completions.create(**asked)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("One 世界 ", "stop")
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(choice.delta.content or "" for part in parts for choice in part.choices) == "One 世界 "
    assert upstream.requests[-1]["stop"] == asked["stop"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"seed": 11}, {"seed": 11}),
        ({"response_format": {"type": "json_object"}},) * 2,
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True}}},) * 2,
        ({"temperature": 0.5, "top_p": 0.25},) * 2,
        ({"logit_bias": {"1": -100}, "frequency_penalty": 1, "presence_penalty": -1},) * 2,
        ({"reasoning_effort": "low", "verbosity": "high"},) * 2,
        ({"prediction": {"type": "content", "content": "x"}, "service_tier": "flex", "user": "u"},) * 2,
        ({"functions": [{"name": "f", "parameters": {}}], "function_call": {"name": "f"}},) * 2,
    ],
)
def test_what_is_asked_reaches_the_provider(client: openai.OpenAI, upstream: Upstream, given: Any, sent: Any) -> None:
    upstream.says(said("{}"), ended(), usage(1, 1))
    client.chat.completions.create(model=CHAT, messages=HELLO, **given)
    assert {name: upstream.requests[-1][name] for name in sent} == sent


def test_a_conversation_reaches_the_provider_whole(client: openai.OpenAI, upstream: Upstream) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages: Any = [
        {"role": "developer", "content": "Be brief.", "name": "dev"},
        {"role": "user", "content": [{"type": "text", "text": "What is that?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "A key.", "tool_call_id": "call_1"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "content": "1", "name": "f"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": "And now?"},
    ]
    upstream.says(said("A key."), ended(), usage(1, 1))
    client.chat.completions.create(model=CHAT, messages=messages)
    assert upstream.requests[-1]["messages"] == messages


def test_the_exact_shape_of_a_stream_with_usage(platform: Platform, upstream: Upstream) -> None:
    upstream.says(said("a"), said("b"), ended(), usage(3, 2))
    body = {"model": CHAT, "messages": HELLO, "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}}
    answer = platform.request("POST", "/v1/chat/completions", json=body)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 and chunk["obfuscation"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert {name: chunks[-1]["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
    }
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    plain = platform.request("POST", "/v1/chat/completions", json={**body, "stream_options": None})
    assert '"usage"' not in plain.text


def test_a_completion_with_everything(client: openai.OpenAI, upstream: Upstream) -> None:
    choice = {"index": 0, "text": "One, two", "finish_reason": "length", "logprobs": {"tokens": ["One"], "token_logprobs": [-0.1]}}
    upstream.answers({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 8}})
    tokens = encoding("o200k_base").encode("One")
    given: Any = {"best_of": 3, "echo": True, "logprobs": 0, "suffix": ".", "max_tokens": 8}
    answer = client.completions.create(model=COMPLETION, prompt=tokens, **given)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("One, two", "length")
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["One"]
    assert {name: upstream.requests[-1][name] for name in given} == given
    assert (upstream.requests[-1]["prompt"], upstream.requests[-1]["stream"]) == ("One", False)


def test_embeddings_of_tokens_are_those_of_their_text(client: openai.OpenAI) -> None:
    texts = ["The key is under the stone.", "世界 👋"]
    tokens = [encoding("cl100k_base").encode(text) for text in texts]
    model = next(model.id for model in client.models.list() if model.model_dump()["tessera"]["capability"] == "embedding")
    by_text = client.embeddings.create(model=model, input=texts)
    by_tokens = client.embeddings.create(model=model, input=tokens)
    alone = client.embeddings.create(model=model, input=tokens[0])
    assert [item.embedding for item in by_tokens.data] == [item.embedding for item in by_text.data]
    assert alone.data[0].embedding == pytest.approx(by_text.data[0].embedding, abs=1e-5)


# --- what cannot be honoured is refused by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": TOOLS}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"temperature": 2.5}, "temperature"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"metadata": {str(number): "x" for number in range(17)}, "store": True}, "metadata"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content[0]"),
    ],
)
def test_a_refusal_names_the_field(client: openai.OpenAI, more: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "local/quote", "messages": HELLO, **more})
    error = refused.value
    assert (error.status_code, error.param, error.type) == (400, param, "invalid_request_error")
    assert error.code


# --- errors are the live API's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "no/such", "messages": HELLO}, (404, "model_not_found", None)),
        ({"model": CHAT, "messages": []}, (400, "empty_array", "messages")),
        ({"model": CHAT}, (400, "missing_required_parameter", "messages")),
        ({"model": CHAT, "messages": HELLO, "temperature": "hot"}, (400, "invalid_type", "temperature")),
        ({"model": CHAT, "messages": HELLO, "temperature": 3}, (400, "decimal_above_max_value", "temperature")),
        ({"model": CHAT, "messages": HELLO, "top_logprobs": 21, "logprobs": True}, (400, "integer_above_max_value", "top_logprobs")),
        ({"model": CHAT, "messages": HELLO, "n": 0}, (400, "integer_below_min_value", "n")),
        ({"model": CHAT, "messages": HELLO, "stop": list("abcde")}, (400, "array_above_max_length", "stop")),
        ({"model": CHAT, "messages": HELLO, "nonsense": 1}, (400, "unknown_parameter", "nonsense")),
        ({"model": CHAT, "messages": [{"role": "king", "content": "x"}]}, (400, "invalid_value", "messages[0].role")),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_errors(platform: Platform, body: Any, error: Any, stream: bool) -> None:
    answer = platform.request("POST", "/v1/chat/completions", json={**body, "stream": stream})
    told = _error(answer)
    assert (answer.status_code, told["code"], told["param"], told["type"]) == (*error, "invalid_request_error")
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0


def _error(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize("stream", [True, False])
def test_a_providers_refusal_keeps_its_words(client: openai.OpenAI, upstream: Upstream, stream: bool) -> None:
    refusal = {"message": "Too long for me.", "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}
    upstream.refuses(400, refusal)
    with pytest.raises(openai.APIError) as refused:
        list(client.chat.completions.create(model=CHAT, messages=HELLO, stream=stream))
    assert (refused.value.code, refused.value.param, refused.value.type) == ("context_length_exceeded", "messages", "invalid_request_error")
    assert "Too long for me." in refused.value.message


def test_a_busy_provider_says_when_to_come_back(platform: Platform, upstream: Upstream) -> None:
    upstream.refuses(429, {"message": "Slow down.", "code": "rate_limit_exceeded"}, retry_after="30")
    answer = platform.request("POST", "/v1/chat/completions", json={"model": CHAT, "messages": HELLO})
    assert (answer.status_code, _error(answer)["code"], _error(answer)["type"]) == (429, "provider_rate_limited", "rate_limit_error")
    assert int(answer.headers["retry-after"]) > 0


def test_a_conflict_is_not_repeated_by_the_sdk(platform: Platform, upstream: Upstream) -> None:
    upstream.says(said("once"), ended(), usage(1, 1))
    headers = {"Idempotency-Key": "conflict"}
    with openai.OpenAI(base_url=f"{platform.url}/v1", api_key=platform.admin_key, max_retries=5) as repeating:
        repeating.chat.completions.create(model=CHAT, messages=HELLO, extra_headers=headers)
        with pytest.raises(openai.ConflictError) as refused:
            repeating.chat.completions.create(model=CHAT, messages=HELLO, seed=1, extra_headers=headers)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.response.request.headers["x-stainless-retry-count"] == "0"


# --- models ------------------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert {CHAT, COMPLETION, "local/quote", "local/ngram"} <= set(listed)
    assert client.models.retrieve(CHAT).id == CHAT
    for refusal, name in ((openai.PermissionDeniedError, CHAT), (openai.NotFoundError, "no/such")):
        with pytest.raises(refusal):
            client.models.delete(name)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("no/such")
    assert unknown.value.code == "model_not_found"
    assert client.models.retrieve(CHAT).id == CHAT


# --- stored completions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_stored_completion_lives_until_it_is_deleted(client: openai.OpenAI, upstream: Upstream, stream: bool) -> None:
    upstream.says(said("Kept."), ended(), usage(2, 1))
    topic = {"topic": f"e2e-{stream}"}
    messages: Any = [{"role": "system", "content": "Be brief."}, *HELLO]
    asked: Any = {"model": CHAT, "messages": messages, "store": True, "metadata": topic, "temperature": 0.5, "stream": stream}
    given: Any = client.chat.completions.create(**asked)
    name = [part.id for part in given][-1] if stream else given.id
    stored = client.chat.completions.retrieve(name)
    assert (stored.choices[0].message.content, stored.metadata) == ("Kept.", topic)
    assert stored.model_dump()["temperature"] == 0.5
    assert not {"store", "metadata"} & upstream.requests[-1].keys()
    assert [found.id for found in client.chat.completions.list(metadata=topic, model=CHAT)] == [name]
    assert [message.content for message in client.chat.completions.messages.list(name, limit=1)] == ["Be brief.", "Hello"]
    assert client.chat.completions.update(name, metadata={"a": "b"}).model_dump()["metadata"] == {"a": "b"}
    assert client.chat.completions.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.delete(name)


def test_a_stored_completion_is_nobody_elses(platform: Platform, client: openai.OpenAI, upstream: Upstream) -> None:
    upstream.says(said("Secret."), ended(), usage(2, 1))
    mine = client.chat.completions.create(model=CHAT, messages=HELLO, store=True).id
    with openai.OpenAI(base_url=f"{platform.url}/v1", api_key=platform.tenant("stored-stranger"), max_retries=0) as stranger:
        assert list(stranger.chat.completions.list()) == []
        tries: Any = (
            lambda: stranger.chat.completions.retrieve(mine),
            lambda: stranger.chat.completions.messages.list(mine),
            lambda: stranger.chat.completions.update(mine, metadata={}),
            lambda: stranger.chat.completions.delete(mine),
            lambda: stranger.chat.completions.list(after=mine),
        )
        for attempt in tries:
            with pytest.raises(openai.NotFoundError) as refused:
                attempt()
            assert refused.value.code == "completion_not_found"
    assert client.chat.completions.retrieve(mine).id == mine
