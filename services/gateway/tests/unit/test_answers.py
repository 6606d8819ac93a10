"""OpenAI's answer objects."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

from tessera.contracts.errors import InvalidError, Problem
from tessera.contracts.events import GenerationChunk, GenerationCompleted, GenerationFailed, Usage
from tessera.contracts.sealing import Sealed
from tessera.gateway.domain.answers import Answer, Form, StreamedAnswer
from tessera.gateway.domain.assembly import Located
from tessera.gateway.routes.schemas.generations import ChatCompletionView, CompletionView

pytestmark = pytest.mark.unit

USAGE = Usage(prompt_tokens=2, completion_tokens=3, source="provider")


def answer(form: Form = "chat", include_usage: bool = False) -> Answer:
    return Answer(form, "g", "m", 1_700_000_000, include_usage)


def completed(text: str = "hi", **more: Any) -> GenerationCompleted:
    fields = {"model_id": "m", "finish_reason": "stop", "usage": USAGE, **more}
    return GenerationCompleted(generation_id="g", attempt=1, last_index=0, text=text, **fields)


def chunk(text: Any, **more: Any) -> GenerationChunk:
    return GenerationChunk(generation_id="g", attempt=1, index=0, text_offset=0, text=text, **more)


def events(streamed: StreamedAnswer, *replies: Any) -> list[Any]:
    frames = [frame for reply in replies for frame in streamed.frames(Located(reply, 3, 17))]
    lines = [line for frame in frames for line in frame.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


def test_whole_answers_fit_the_sdk_and_our_own_document() -> None:
    chat, text = answer().whole(completed()), answer("text").whole(completed())
    assert ChatCompletion.model_validate(chat).choices[0].message.content == "hi"
    assert Completion.model_validate(text).choices[0].text == "hi"
    ChatCompletionView.model_validate(chat)
    CompletionView.model_validate(text)
    assert chat["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "source": "provider"}


def test_a_providers_details_stand_in_the_usage() -> None:
    usage = USAGE.model_copy(update={"details": {"prompt_tokens_details": {"cached_tokens": 1}}})
    parsed = ChatCompletion.model_validate(answer().whole(completed(usage=usage))).usage
    assert parsed is not None
    assert parsed.prompt_tokens_details is not None
    assert (parsed.prompt_tokens_details.cached_tokens, parsed.total_tokens) == (1, 5)


def test_an_answer_of_tool_calls_has_no_content() -> None:
    message = answer().whole(completed("", message={"tool_calls": [{"id": "1"}], "role": "robot"}))["choices"][0]["message"]
    assert (message["role"], message["content"], message["tool_calls"]) == ("assistant", None, [{"id": "1"}])


def test_a_chat_stream_begins_with_the_role_and_ends_with_usage_only_if_asked() -> None:
    plain = events(StreamedAnswer(answer()), chunk("a"), completed())
    asked = events(StreamedAnswer(answer(include_usage=True)), chunk("a"), completed())
    assert plain[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("usage" not in event for event in plain[:-1])
    assert [event["usage"] for event in asked[:-2]] == [None, None, None]
    assert (asked[-2]["choices"], asked[-2]["usage"]["total_tokens"], asked[-1]) == ([], 5, "[DONE]")
    for event in asked[:-1]:
        ChatCompletionChunk.model_validate(event)


def test_calls_of_a_whole_message_have_no_index() -> None:
    calls = [{"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    message = answer().whole(completed("", message={"tool_calls": calls}))["choices"][0]["message"]
    assert message["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_function_call_has_its_own_reason() -> None:
    called = {"function_call": {"name": "f", "arguments": "{}"}}
    choice = answer().whole(completed("", message=called))["choices"][0]
    assert (choice["finish_reason"], choice["message"]["function_call"], choice["message"]["content"]) == (
        "function_call",
        called["function_call"],
        None,
    )


@pytest.mark.parametrize("form", ["chat", "text"])
def test_log_probabilities_stand_beside_what_was_said(form: Form) -> None:
    first, both = {"content": [{"token": "h"}]}, {"content": [{"token": "h"}, {"token": "i"}]}
    whole = answer(form).whole(completed(message={"logprobs": both}))
    shown = events(StreamedAnswer(answer(form)), chunk("h", delta={"logprobs": first}), completed(message={"logprobs": both}))
    assert whole["choices"][0]["logprobs"] == both
    assert "logprobs" not in whole["choices"][0].get("message", {})
    assert [event["choices"][0]["logprobs"] for event in shown[:-1] if event["choices"][0]["logprobs"]] == [first]


def test_several_choices() -> None:
    further = ({"text": "no", "finish_reason": "length", "message": {"refusal": "x"}},)
    end = completed("hi", further=further)
    whole = ChatCompletion.model_validate(answer().whole(end))
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in whole.choices] == [
        (0, "hi", "stop"),
        (1, "no", "length"),
    ]
    shown = events(StreamedAnswer(answer(include_usage=True)), chunk("n", choice=1), chunk("hi"), chunk("o", choice=1), end)
    pieces = [(event["choices"][0]["index"], event["choices"][0]["delta"].get("content")) for event in shown[:-2]]
    assert pieces == [(1, ""), (1, "n"), (0, ""), (0, "hi"), (1, "o"), (0, None), (1, None)]
    assert [event["choices"][0]["finish_reason"] for event in shown[-4:-2]] == ["stop", "length"]
    assert (shown[-2]["choices"], shown[-2]["usage"]["total_tokens"]) == ([], 5)


def test_chunks_are_padded_only_if_asked() -> None:
    padded = events(StreamedAnswer(Answer("chat", "g", "m", 1, obfuscated=True)), chunk("a"), completed())
    assert all(1 <= len(event["obfuscation"]) <= 32 for event in padded[:-1])
    assert all("obfuscation" not in event for event in events(StreamedAnswer(answer()), chunk("a"), completed())[:-1])


def test_an_answer_without_a_chunk_still_opens_and_closes() -> None:
    shown = events(StreamedAnswer(answer()), completed(""))
    assert [event["choices"][0]["finish_reason"] for event in shown[:-1]] == [None, "stop"]


def test_frames_of_one_record_are_numbered() -> None:
    frames = StreamedAnswer(answer()).frames(Located(chunk("a", delta={"tool_calls": []}), 3, 17))
    assert [frame.split(b"\n")[0] for frame in frames] == [b"id: g.3.17.0", b"id: g.3.17.1", b"id: g.3.17.2"]


def test_a_failure_is_an_error_event_and_no_done() -> None:
    failure = GenerationFailed(generation_id="g", problem=Problem(code="provider_timeout", message="slow"))
    assert events(StreamedAnswer(answer()), failure) == [
        {"error": {"message": "slow", "type": "server_error", "param": None, "code": "provider_timeout"}}
    ]


def test_sealed_content_is_not_guessed() -> None:
    with pytest.raises(InvalidError, match="sealed"):
        StreamedAnswer(answer()).frames(Located(chunk(Sealed(key_id="k", nonce="n", ciphertext="c")), 0, 0))
