"""Chat and completions through the official SDK, over a real gateway and a real log."""

import json
from datetime import timedelta
from typing import Any

import openai
import pytest

from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem
from tessera.contracts.events import (
    GenerationCancelled,
    GenerationChunk,
    GenerationCompleted,
    GenerationFailed,
    GenerationRequested,
    RequestFailed,
    Usage,
)
from tessera.testkit import eventually_blocking

pytestmark = pytest.mark.integration

USAGE = Usage(prompt_tokens=9, completion_tokens=3, source="counted")
HELLO = [{"role": "user", "content": "Hello"}]


def chunk(generation: str, index: int, text: str, **more: Any) -> GenerationChunk:
    return GenerationChunk(generation_id=generation, attempt=1, index=index, text_offset=0, text=text, **more)


def completed(generation: str, last_index: int, text: str, **more: Any) -> GenerationCompleted:
    fields = {"model_id": "local/quote", "finish_reason": "stop", "usage": USAGE, **more}
    return GenerationCompleted(generation_id=generation, attempt=1, last_index=last_index, text=text, **fields)


def answering(*texts: str, **more: Any) -> Any:
    """The chunks, with the completion overtaking the last one and a chunk said twice."""

    def script(heard: Any) -> list[EventData]:
        generation = heard.data["generation_id"]
        chunks = [chunk(generation, index, text) for index, text in enumerate(texts)]
        done = completed(generation, len(texts) - 1, "".join(texts), **more)
        return [*chunks[:-1], *chunks[:1], done, *chunks[-1:]]

    return script


def test_a_streamed_chat_reads_as_the_sdk_expects(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering("Hel", "lo ", "世界 👋"))
    with gateway.openai() as client:
        stream = client.chat.completions.create(
            model="local/quote", messages=HELLO, stream=True, stream_options={"include_usage": True}, max_completion_tokens=7, stop=["\n"]
        )
        chunks = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in chunks if part.choices) == "Hello 世界 👋"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in chunks if part.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.total_tokens) == (9, 12)
    assert all(part.usage is None for part in chunks[:-1])
    assert len({part.id for part in chunks}) == 1
    heard = gateway.peer.of(GenerationRequested)[-1]
    assert heard.data["parameters"] == {"max_tokens": 7, "stop": ["\n"], "extra": {}}
    assert heard.attributes["tenantid"] == "default"
    assert heard.key == heard.data["generation_id"].encode()
    assert heard.attributes["deadline"]


def test_every_frame_names_its_place_in_the_log(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering("a", "b"))
    body = {"model": "local/quote", "messages": HELLO, "stream": True}
    with gateway.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    ids = [line.removeprefix("id: ").split(".") for line in lines if line.startswith("id: ")]
    generation, partition = gateway.peer.of(GenerationRequested)[-1].data["generation_id"], ids[0][1]
    assert {(name, where) for name, where, _, _ in ids} == {(generation, partition)}
    places = [(int(offset), int(frame)) for _, _, offset, frame in ids]
    assert len(set(places)) == len(places)
    assert lines[-2] == "data: [DONE]"
    payloads = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all("usage" not in payload for payload in payloads)


def test_a_chat_that_does_not_stream_has_the_whole_answer(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering("Yes", ".", recall="complete", source_ids=("m-1",)))
    with gateway.openai() as client:
        answer = client.chat.completions.create(model="local/quote", messages=HELLO, extra_body={"tessera": {"memory": {"limit": 3}}})
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.model_extra == {"source": "counted"}
    assert answer.model_extra == {"tessera": {"recall": "complete", "source_ids": ["m-1"]}}
    assert gateway.peer.of(GenerationRequested)[-1].data["memory"] == {"limit": 3, "token_budget": 2000}


def test_memory_is_not_asked_unless_wanted(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering("Yes"))
    with gateway.openai() as client:
        client.chat.completions.create(model="local/quote", messages=HELLO)
    assert "memory" not in gateway.peer.of(GenerationRequested)[-1].data


def test_a_text_completion(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering(" upon", " a time", model_id="local/ngram", finish_reason="length"))
    with gateway.openai() as client:
        answer = client.completions.create(model="local/ngram", prompt="Once", max_tokens=3, seed=7, temperature=0.5)
        parts = list(client.completions.create(model="local/ngram", prompt="Once", max_tokens=3, stream=True))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" upon a time", "length")
    assert "".join(part.choices[0].text for part in parts) == " upon a time"
    assert parts[-1].choices[0].finish_reason == "length"


def test_tools_go_to_a_remote_provider_and_its_calls_come_back(gateway: Any) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

    def script(heard: Any) -> list[EventData]:
        generation = heard.data["generation_id"]
        message = {"tool_calls": [{name: value for name, value in call.items() if name != "index"}]}
        done = completed(generation, 0, "", model_id="remote/chat", finish_reason="tool_calls", message=message)
        return [chunk(generation, 0, "", delta={"tool_calls": [call]}), done]

    gateway.peer.on(GenerationRequested, script)
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    with gateway.openai() as client:
        whole = client.chat.completions.create(model="remote/chat", messages=HELLO, tools=tools)
        parts = list(client.chat.completions.create(model="remote/chat", messages=HELLO, tools=tools, stream=True))
    assert whole.choices[0].message.tool_calls is not None
    assert whole.choices[0].message.tool_calls[0].id == "call_1"
    assert whole.choices[0].message.content is None
    deltas = [part.choices[0].delta.tool_calls for part in parts if part.choices and part.choices[0].delta.tool_calls]
    assert deltas[0] is not None
    assert deltas[0][0].id == "call_1"
    assert gateway.peer.of(GenerationRequested)[-1].data["parameters"]["extra"]["tools"] == tools


def test_a_failure_is_an_error_object_and_an_error_event(gateway: Any) -> None:
    def script(heard: Any) -> list[EventData]:
        generation = heard.data["generation_id"]
        problem = Problem(code="provider_error", message="The provider broke down.")
        return [chunk(generation, 0, "so far"), GenerationFailed(generation_id=generation, last_index=0, problem=problem)]

    gateway.peer.on(GenerationRequested, script)
    with gateway.openai() as client:
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="local/quote", messages=HELLO)
        assert (refused.value.status_code, refused.value.code, refused.value.type) == (502, "provider_error", "server_error")
        stream = client.chat.completions.create(model="local/quote", messages=HELLO, stream=True)
        seen: list[str] = []
        with pytest.raises(openai.APIError, match="broke down"):
            seen.extend(part.choices[0].delta.content or "" for part in stream)


def test_a_request_that_another_service_refuses_ends_the_stream(gateway: Any) -> None:
    gateway.peer.on(
        GenerationRequested, lambda _: [RequestFailed(problem=Problem(code="context_length_exceeded", message="Too long.", status=400))]
    )
    with gateway.openai() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="local/quote", messages=HELLO)
    assert refused.value.code == "context_length_exceeded"


def test_silence_is_kept_alive_then_ends_with_an_error_and_a_cancellation(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, lambda _: [])
    body = {"model": "local/quote", "messages": HELLO, "stream": True}
    with gateway.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        text = "".join(response.iter_text())
    assert text.count(": keep-alive") > 5
    assert '"code":"timed_out"' in text
    assert "[DONE]" not in text
    generation = gateway.peer.of(GenerationRequested)[-1].data["generation_id"]
    cancelled = eventually_blocking(
        lambda: [said for said in gateway.peer.of(GenerationCancelled) if said.data["generation_id"] == generation]
    )
    assert cancelled[0].data["reason"] == "deadline"


def test_silence_without_a_stream_is_504(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, lambda _: [])
    with gateway.http() as client:
        response = client.post("/v1/chat/completions", json={"model": "local/quote", "messages": HELLO})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timed_out")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_generation(gateway: Any, stream: bool) -> None:
    gateway.peer.on(GenerationRequested, lambda heard: [chunk(heard.data["generation_id"], 0, "first")])
    before = len(gateway.peer.of(GenerationRequested))
    body = {"model": "local/quote", "messages": HELLO, "stream": stream}
    with gateway.http() as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(Exception, match="timed out"):
                client.post("/v1/chat/completions", json=body, timeout=0.7)
    asked = eventually_blocking(lambda: gateway.peer.of(GenerationRequested)[before:])
    generation = asked[0].data["generation_id"]
    cancelled = eventually_blocking(
        lambda: [said for said in gateway.peer.of(GenerationCancelled) if said.data["generation_id"] == generation]
    )
    assert cancelled[0].data["reason"] == "client_disconnected"


def once(answer: Any) -> Any:
    """A service that knows what it has done already."""
    done: set[str] = set()

    def script(heard: Any) -> list[EventData]:
        generation = heard.data["generation_id"]
        if generation in done:
            return []
        done.add(generation)
        replies: list[EventData] = answer(heard)
        return replies

    return script


@pytest.mark.parametrize("stream", [True, False])
def test_the_same_idempotency_key_joins_the_same_generation(gateway: Any, stream: bool) -> None:
    gateway.peer.on(GenerationRequested, once(answering("on", "ce")))
    body = {"model": "local/quote", "messages": HELLO, "stream": stream}
    headers = {"Idempotency-Key": f"only-once-{stream}"}
    before = len(gateway.peer.of(GenerationRequested))
    with gateway.http() as client:
        first, second = (client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(2))
        other = client.post("/v1/chat/completions", json={**body, "seed": 1}, headers=headers)
    assert (first.status_code, "on" in first.text) == (200, True)
    assert second.text.replace(": keep-alive\n\n", "") == first.text.replace(": keep-alive\n\n", "")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert len(gateway.peer.of(GenerationRequested)[before:]) == 1


def test_a_client_that_left_finds_its_generation_again_by_its_key(gateway: Any) -> None:
    held: list[Any] = []

    def script(heard: Any) -> list[EventData]:
        held.append(heard)
        return [chunk(heard.data["generation_id"], 0, "first")] if len(held) == 1 else []

    gateway.peer.on(GenerationRequested, script)
    body = {"model": "local/quote", "messages": HELLO, "stream": True}
    headers = {"Idempotency-Key": "interrupted"}
    with gateway.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            next(line for line in response.iter_lines() if "first" in line)
        generation, partition = held[0].data["generation_id"], held[0].data["reply_partition"]
        gateway.peer.say(completed(generation, 0, "first"), partition=partition, correlation=held[0].attributes["id"])
        again = client.post("/v1/chat/completions", json=body, headers=headers)
    assert "first" in again.text
    assert again.text.endswith("data: [DONE]\n\n")
    assert not [said for said in gateway.peer.of(GenerationCancelled) if said.data["generation_id"] == generation]


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_is_stored_listed_labelled_and_deleted_by_the_sdk(gateway: Any, stream: bool) -> None:
    gateway.peer.on(GenerationRequested, answering("Ye", "s"))
    topic = {"topic": f"stored-{stream}"}
    with gateway.openai() as client:
        given: Any = client.chat.completions.create(model="local/quote", messages=HELLO, store=True, metadata=topic, seed=4, stream=stream)
        name = [part.id for part in given][-1] if stream else given.id
        kept = client.chat.completions.retrieve(name)
        assert (kept.choices[0].message.content, kept.metadata, kept.seed) == ("Yes", topic, 4)  # type: ignore[attr-defined]
        assert stream or kept.choices == given.choices
        assert [found.id for found in client.chat.completions.list(metadata=topic)] == [name]
        assert [message.content for message in client.chat.completions.messages.list(name)] == ["Hello"]
        client.chat.completions.update(name, metadata={"reviewed": "yes"})
        assert list(client.chat.completions.list(metadata=topic)) == []
        assert client.chat.completions.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(name)


def test_lists_of_stored_chats_are_paged_by_the_sdk(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering("Yes"))
    with gateway.openai() as client:
        names = [
            client.chat.completions.create(model="local/quote", messages=HELLO, store=True, metadata={"topic": "pages"}).id
            for _ in range(5)
        ]
        found = [stored.id for stored in client.chat.completions.list(metadata={"topic": "pages"}, limit=2, order="desc")]
    assert sorted(found) == sorted(names)


def test_a_chat_that_fails_is_not_stored(gateway: Any) -> None:
    gateway.peer.on(
        GenerationRequested, lambda _: [RequestFailed(problem=Problem(code="context_length_exceeded", message="Too long.", status=400))]
    )
    with gateway.openai() as client:
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="local/quote", messages=HELLO, store=True, metadata={"topic": "failed"})
        assert list(client.chat.completions.list(metadata={"topic": "failed"})) == []


def test_an_end_that_nobody_waited_for_is_stored_from_the_log(gateway: Any) -> None:
    held: list[Any] = []

    def script(heard: Any) -> list[EventData]:
        held.append(heard)
        return [chunk(heard.data["generation_id"], 0, "first")] if len(held) == 1 else []

    gateway.peer.on(GenerationRequested, script)
    body = {"model": "local/quote", "messages": HELLO, "stream": True, "store": True, "metadata": {"topic": "repaired"}}
    with gateway.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=body, headers={"Idempotency-Key": "left alone"}) as response:
            next(line for line in response.iter_lines() if "first" in line)
        generation = held[0].data["generation_id"]
        path = f"/v1/chat/completions/chatcmpl-{generation}"
        assert client.get(path).status_code == 404
        gateway.peer.say(completed(generation, 0, "first"), partition=held[0].data["reply_partition"], correlation=held[0].attributes["id"])
        stored = eventually_blocking(lambda: client.get(path).is_success and client.get(path).json(), timedelta(seconds=60))
    assert (stored["choices"][0]["message"]["content"], stored["metadata"]) == ("first", {"topic": "repaired"})
