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
