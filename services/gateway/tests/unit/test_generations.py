"""Following a generation: the ends that it can have."""

from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tessera.contracts.events import (
    ChatMessage,
    GenerationCancelled,
    GenerationChunk,
    GenerationCompleted,
    GenerationRequested,
    ModelReference,
    Usage,
)
from tessera.gateway.domain.answers import Answer, StreamedAnswer
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.errors import ApiError, unavailable
from tessera.gateway.handlers.generations import Generation, Limits, generation_id
from tessera.gateway.ports import Call

pytestmark = pytest.mark.unit

MODEL = ModelReference(model_id="chat", provider="local", capability="chat", encoding="e", template="t", exact=True)
REQUEST = GenerationRequested(reply_partition=3, generation_id="g", model=MODEL, messages=(ChatMessage(role="user", content="x"),))
CALL = Call("default", "r")


def following(log: Any, timeout: float = 0.2, keep_alive: float = 0.05) -> Generation:
    return Generation(log, REQUEST, CALL, Limits(timedelta(seconds=timeout), timedelta(seconds=keep_alive)))


def cancellations(log: Any) -> list[str]:
    return [data.reason for data, _ in log.published if isinstance(data, GenerationCancelled)]


async def test_a_stream_that_nobody_answers_lives_then_ends_with_an_error(desk: Any) -> None:
    generation = following(desk.log)
    await generation.open()
    frames = [frame async for frame in generation.frames(StreamedAnswer(Answer("chat", "g", "chat", 0)))]
    await generation.close()
    assert frames[0] == b": keep-alive\n\n"
    assert b'"code":"timed_out"' in frames[-1]
    assert cancellations(desk.log) == ["deadline"]
    assert desk.log.open_streams == 0


async def test_closing_early_cancels_once(desk: Any) -> None:
    desk.log.replies = [Located(GenerationChunk(generation_id="g", attempt=1, index=0, text_offset=0, text="x"), 3, 0)]
    generation = following(desk.log)
    await generation.open()
    frames = generation.frames(StreamedAnswer(Answer("chat", "g", "chat", 0)))
    await anext(frames)
    await frames.aclose()
    await generation.close()
    await generation.close()
    assert cancellations(desk.log) == ["client_disconnected"]


async def test_what_was_never_published_is_not_cancelled(desk: Any) -> None:
    desk.log.refuses = lambda _: unavailable("The event log")
    generation = following(desk.log)
    with pytest.raises(ApiError, match="event log"):
        await generation.open()
    await generation.close()
    assert (cancellations(desk.log), desk.log.open_streams) == ([], 0)


async def test_a_cancellation_that_cannot_be_sent_is_told_in_the_log_only(desk: Any) -> None:
    generation = following(desk.log)
    await generation.open()
    desk.log.refuses = lambda _: unavailable("The event log")
    await generation.close()
    assert desk.log.open_streams == 0


async def test_replies_that_end_without_an_ending_are_an_error(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ended() -> Any:
        for reply in ():
            yield reply

    monkeypatch.setattr(desk.log, "_replies", ended)
    generation = following(desk.log)
    await generation.open()
    with pytest.raises(ApiError, match="without a result"):
        await generation.completed()
    await generation.close()


async def test_the_wait_for_the_first_piece_and_for_the_end_is_measured_once(desk: Any) -> None:
    model = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "local", "gen_ai_request_model": "chat"}
    names = {"gen_ai_server_time_to_first_token_seconds_count": {}, "gen_ai_server_request_duration_seconds_count": {"error_type": ""}}

    def told() -> list[float]:
        return [REGISTRY.get_sample_value(name, {**model, **labels}) or 0.0 for name, labels in names.items()]

    before = told()
    usage = Usage(prompt_tokens=1, completion_tokens=1, source="counted")
    end = GenerationCompleted(generation_id="g", attempt=1, last_index=1, model_id="chat", text="xy", finish_reason="stop", usage=usage)
    pieces = [GenerationChunk(generation_id="g", attempt=1, index=index, text_offset=index, text="x") for index in range(2)]
    desk.log.replies = [Located(said, 3, offset) for offset, said in enumerate([*pieces, end])]
    generation = following(desk.log)
    await generation.open()
    await generation.completed()
    await generation.close()
    assert [new - old for new, old in zip(told(), before, strict=True)] == [1, 1]


def test_ids_follow_the_tenant_and_the_idempotency_key() -> None:
    assert generation_id("a", "k") == generation_id("a", "k")
    assert len({generation_id("a", "k"), generation_id("b", "k"), generation_id("a", "l"), generation_id("a", None)}) == 4
