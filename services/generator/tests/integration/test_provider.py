"""The provider client against a real HTTP server that behaves and misbehaves as servers in the field do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from tessera.contracts import ChatMessage
from tessera.generator.adapters.openai_compatible import OpenAICompatibleProvider
from tessera.generator.domain.endings import EngineError, GenerationInterruptedError
from tessera.generator.domain.pieces import Piece, TokenFigures
from tessera.generator.domain.policies import ProviderPolicy
from tessera.generator.ports import Job
from tessera.resilience import CircuitOpenError, RetryPolicy
from tessera.testkit import eventually

pytestmark = pytest.mark.integration

LeaseJob = Callable[..., Job]
QUICK = ProviderPolicy(
    connect_timeout=timedelta(seconds=2),
    read_timeout=timedelta(seconds=2),
    retry=RetryPolicy(attempts=3, initial=timedelta(milliseconds=1), maximum=timedelta(milliseconds=5)),
    breaker_failures=4,
    breaker_reset=timedelta(seconds=0.2),
)


@pytest.fixture
async def provider(upstream: Any) -> AsyncIterator[OpenAICompatibleProvider]:
    made = new_provider(upstream.base_url)
    yield made
    await made.close()


def new_provider(base_url: str, policy: ProviderPolicy = QUICK) -> OpenAICompatibleProvider:
    return OpenAICompatibleProvider(
        "up", base_url, api_key=SecretStr("sk-secret"), upstream_names={"up": "upstream-1"}, policy=policy, concurrency=8
    )


async def pieces(provider: OpenAICompatibleProvider, job: Job) -> list[Piece]:
    return [piece async for piece in provider.generate(job)]


async def code_of(provider: OpenAICompatibleProvider, job: Job) -> str:
    with pytest.raises(EngineError) as caught:
        await pieces(provider, job)
    return caught.value.code


async def test_a_chat_is_streamed_with_the_providers_usage(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams_well("Hel", "lo")
    found = await pieces(provider, leased_job("up"))
    assert "".join(piece.text for piece in found) == "Hello"
    assert [piece.finish_reason for piece in found if piece.finish_reason] == ["stop"]
    assert found[-1].figures == TokenFigures(11, 5, "provider")
    assert upstream.paths == ["/v1/chat/completions"]
    assert upstream.headers[0]["authorization"] == "Bearer sk-secret"


async def test_the_details_of_the_usage_come_along(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2}}
    usage = {"prompt_tokens": 11, "completion_tokens": 5, **details, "completion_tokens_odd": 1}
    upstream.streams(upstream.said("ok"), upstream.finished(), upstream.event(choices=[], usage=usage), b"data: [DONE]\n\n")
    found = await pieces(provider, leased_job("up"))
    assert found[-1].figures == TokenFigures(11, 5, "provider", details)


async def test_the_request_is_passed_on_whole(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams_well("ok")
    message = ChatMessage(
        role="user", content=({"type": "text", "text": "What is that?"}, {"type": "image_url", "image_url": {"url": "data:,"}})
    )
    parameters = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "stop": ("END",), "seed": 4, "extra": {"min_p": 0.1, "model": "other"}}
    await pieces(provider, leased_job("up", messages=(message,), parameters=parameters))
    assert upstream.requests[0] == {
        "model": "upstream-1",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is that?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]}
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["END"],
        "seed": 4,
        "min_p": 0.1,
    }


async def test_the_limit_has_the_name_that_the_provider_knows(upstream: Any, leased_job: LeaseJob) -> None:
    upstream.streams_well("ok")
    provider = new_provider(upstream.base_url, replace(QUICK, limit_field="max_completion_tokens"))
    await pieces(provider, leased_job("up", parameters={"max_tokens": 9}))
    await provider.close()
    assert (upstream.requests[0]["max_completion_tokens"], "max_tokens" in upstream.requests[0]) == (9, False)


async def test_recalled_memories_ground_the_chat(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams_well("ok")
    messages = (ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Where?"))
    found = await pieces(provider, leased_job("up", messages=messages, memories=[("m1", "The key is under the mat.")]))
    sent = upstream.requests[0]["messages"]
    assert [message["role"] for message in sent] == ["system", "system", "user"]
    assert "[memory:m1] The key is under the mat." in sent[1]["content"]
    assert found[0].source_ids == ("m1",)


async def test_a_text_completion_uses_its_own_path(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams(upstream.event(choices=[{"text": "lo", "finish_reason": "length"}]), b"data: [DONE]\n\n")
    found = await pieces(provider, leased_job("up", prompt="Hel"))
    assert [(piece.text, piece.finish_reason) for piece in found] == [("lo", "length")]
    assert upstream.paths == ["/v1/completions"]
    assert upstream.requests[0]["prompt"] == "Hel"


async def test_unknown_fields_come_through(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{"}}
    upstream.streams(
        upstream.event(choices=[{"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}}], citations=["https://example.org"]),
        upstream.finished("tool_calls"),
    )
    found = await pieces(provider, leased_job("up"))
    assert found[0].delta == {"tool_calls": [call], "citations": ["https://example.org"]}
    assert found[1].finish_reason == "tool_calls"


async def test_a_server_that_does_not_stream(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.answers_whole(
        choices=[{"index": 0, "message": {"role": "assistant", "content": "all at once"}, "finish_reason": "stop"}],
        usage={"prompt_tokens": 3, "completion_tokens": 4},
    )
    assert await pieces(provider, leased_job("up")) == [Piece("all at once", {}, "stop", TokenFigures(3, 4, "provider"))]


async def test_characters_cut_across_packets(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    raw = 'data: {"choices":[{"index":0,"delta":{"content":"\U0001f600 \u4f60\u597d"}}]}\n\n'.encode() + upstream.finished()
    upstream.streams(*(raw[at : at + 1] for at in range(len(raw))))
    assert "".join(piece.text for piece in await pieces(provider, leased_job("up"))) == "\U0001f600 \u4f60\u597d"


@pytest.mark.parametrize("cut", [True, False])
async def test_a_stream_that_breaks_off_is_not_taken_for_an_end(
    upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob, cut: bool
) -> None:
    upstream.streams(upstream.said("half a sen"), cut=cut)
    with pytest.raises(GenerationInterruptedError):
        await pieces(provider, leased_job("up"))
    assert len(upstream.requests) == 1


async def test_silence_in_mid_stream(upstream: Any, leased_job: LeaseJob) -> None:
    provider = new_provider(upstream.base_url, replace(QUICK, read_timeout=timedelta(seconds=0.1)))
    upstream.streams(upstream.said("one"), upstream.said("two"), pause=0.6)
    with pytest.raises(GenerationInterruptedError, match="silent"):
        await pieces(provider, leased_job("up"))
    await provider.close()


async def test_an_error_inside_the_stream(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams(upstream.said("one"), upstream.event(error={"message": "out of memory", "code": 500}))
    assert await code_of(provider, leased_job("up")) == "provider_error"


@pytest.mark.parametrize(
    "garbage", [b"data: {nonsense\n\n", b"data: [1]\n\n", b'data: {"choices": 3}\n\n', b'data: {"choices":[{"delta":{"content":3}}]}\n\n']
)
async def test_malformed_events(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob, garbage: bytes) -> None:
    upstream.streams(garbage)
    assert await code_of(provider, leased_job("up")) == "provider_malformed_answer"


@pytest.mark.parametrize(
    "refusal",
    [
        (400, {"message": "too long", "code": "context_length_exceeded"}, "context_length_exceeded", 1),
        (400, {"message": "no such format", "code": "invalid_value"}, "invalid_value", 1),
        (400, {"message": "odd", "code": "Not a word!"}, "provider_refused_request", 1),
        (400, {"message": "bad", "code": 17}, "provider_refused_request", 1),
        (401, {"message": "bad key sk-secret"}, "provider_authentication_failed", 1),
        (404, {"message": "no such model"}, "provider_model_not_found", 1),
        (429, {"message": "slow down"}, "provider_rate_limited", 3),
        (500, "plain", "provider_error", 3),
        (503, {"message": "loading"}, "provider_error", 3),
    ],
)
async def test_refusals(
    upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob, refusal: tuple[int, Any, str, int]
) -> None:
    status, error, code, calls = refusal
    upstream.refuses(status, error)
    with pytest.raises(EngineError) as caught:
        await pieces(provider, leased_job("up"))
    assert caught.value.code == code
    assert "sk-secret" not in caught.value.message
    assert len(upstream.requests) == calls


async def test_a_passing_failure_is_repeated(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.refuses(503)
    upstream.refuses(429, headers={"retry-after-ms": "5"})
    upstream.streams_well("at last")
    assert "".join(piece.text for piece in await pieces(provider, leased_job("up"))) == "at last"


async def test_a_long_retry_after_is_not_waited_for(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.refuses(429, headers={"retry-after": "3600"})
    assert await code_of(provider, leased_job("up")) == "provider_rate_limited"
    assert len(upstream.requests) == 1


async def test_the_breaker_opens_degrades_and_recovers(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.refuses(500)
    assert await code_of(provider, leased_job("up")) == "provider_error"
    with pytest.raises(CircuitOpenError):
        await pieces(provider, leased_job("up"))
    assert provider.suspended > timedelta(0)
    with pytest.raises(Exception, match="failed too often"):
        await provider.check()
    upstream.answers.clear()
    upstream.streams_well("back")
    await eventually(lambda: not provider.suspended)
    assert (await pieces(provider, leased_job("up")))[0].text == "back"
    await provider.check()


async def test_nobody_listens(leased_job: LeaseJob) -> None:
    provider = new_provider("http://127.0.0.1:9/v1")
    assert await code_of(provider, leased_job("up")) == "provider_unavailable"
    await provider.close()


async def test_closing_the_generator_closes_the_connection(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams_endlessly()
    async with aclosing(provider.generate(leased_job("up"))) as generation:
        await anext(generation)
        assert upstream.open_streams == 1
    async with asyncio.timeout(5):
        await upstream.disconnected.wait()


async def test_several_choices_come_each_with_its_own_end(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    ending = {"delta": {}, "finish_reason": "stop"}
    upstream.streams(
        upstream.said("b", index=1),
        upstream.said("a"),
        upstream.said("never asked for", index=2),
        upstream.event(choices=[{"index": 0, **ending}, {"index": 1, **ending}], citations=["x"]),
        upstream.usage(11, 5),
        b"data: [DONE]\n\n",
    )
    found = await pieces(provider, leased_job("up", parameters={"n": 2}))
    assert [(piece.choice, piece.text) for piece in found if piece.text] == [(1, "b"), (0, "a")]
    assert [(piece.choice, piece.delta) for piece in found if piece.finish_reason] == [(0, {"citations": ["x"]}), (1, {})]
    assert found[-1].figures == TokenFigures(11, 5, "provider")
    assert upstream.requests[0]["n"] == 2


async def test_one_of_several_choices_that_never_ends(upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob) -> None:
    upstream.streams(upstream.said("a"), upstream.said("b", index=1), upstream.finished())
    with pytest.raises(GenerationInterruptedError):
        await pieces(provider, leased_job("up", parameters={"n": 2}))


async def test_the_best_of_several_is_asked_for_without_a_stream(
    upstream: Any, provider: OpenAICompatibleProvider, leased_job: LeaseJob
) -> None:
    choices = [{"index": index, "text": text, "finish_reason": "length"} for index, text in enumerate(("one", "two"))]
    upstream.answers_whole(choices=choices, usage={"prompt_tokens": 3, "completion_tokens": 40})
    found = await pieces(provider, leased_job("up", prompt="Say", parameters={"n": 2, "extra": {"best_of": 5}}))
    assert [(piece.choice, piece.text, piece.finish_reason) for piece in found] == [(0, "one", "length"), (1, "two", "length")]
    assert found[0].figures == TokenFigures(3, 40, "provider")
    assert (upstream.requests[0]["stream"], upstream.requests[0]["best_of"], "stream_options" in upstream.requests[0]) == (False, 5, False)


async def test_the_key_is_never_logged(
    upstream: Any,
    provider: OpenAICompatibleProvider,
    leased_job: LeaseJob,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    upstream.refuses(401)
    await code_of(provider, leased_job("up"))
    assert "sk-secret" not in caplog.text + capsys.readouterr().out
