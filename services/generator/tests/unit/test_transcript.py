"""A transcript, its chunks and its ending."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tessera.contracts import FurtherChoice, GenerationReady, InvalidError, Problem, RetryableError, Usage
from tessera.generator.domain.endings import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INTERNAL,
    EngineError,
    GenerationCancelledError,
    GenerationInterruptedError,
    Replay,
    completed,
    problem_of,
    usage_of,
)
from tessera.generator.domain.pieces import Piece, Said, TokenFigures
from tessera.generator.domain.transcript import MAXIMUM_TEXT_CHARACTERS, Progress, Transcript
from tessera.generator.ports import Job

pytestmark = pytest.mark.unit
LeaseJob = Callable[..., Job]


def spoken(*pieces: Piece, stops: tuple[str, ...] = ()) -> Transcript:
    transcript = Transcript(stops)
    for piece in pieces:
        transcript.take(piece)
    transcript.finish()
    return transcript


def test_a_stop_sequence_ends_it() -> None:
    transcript = spoken(Piece("one\nt"), Piece("wo", finish_reason="length"), stops=("\n",))
    assert (transcript.text, transcript.choices[0].finish_reason, transcript.ended) == ("one", "stop", True)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    transcript = spoken(Piece("almost EN"), Piece(finish_reason="stop"), stops=("END",))
    assert transcript.text == "almost EN"


def test_a_nul_cannot_break_the_event() -> None:
    assert spoken(Piece("a\x00b")).text == "a\ufffdb"


def test_an_endless_text_ends_with_length() -> None:
    transcript = spoken(Piece("x" * (MAXIMUM_TEXT_CHARACTERS + 5)))
    assert (len(transcript.text), transcript.choices[0].finish_reason, transcript.ended) == (MAXIMUM_TEXT_CHARACTERS, "length", True)


def test_chunks_count_characters() -> None:
    progress = Progress()
    for text in ("\U0001f600", "你好"):
        progress = progress.after(progress.next_chunk(Said(text)))
    assert progress == Progress(1, 1, "\U0001f600你好")
    assert progress.last_chunk().text == "你好"
    assert progress.next_chunk(Said("!")).text_offset == 3


def test_choices_end_each_by_itself() -> None:
    transcript = Transcript(("END",), 2)
    said = [transcript.take(Piece(text, choice=choice)) for choice, text in ((0, "one EN"), (1, "two"), (0, "D more"), (1, " E"))]
    assert [(part.choice, part.text) for part in said] == [(0, "one "), (1, "two"), (0, ""), (1, " ")]
    assert not transcript.ended
    assert transcript.take(Piece(" never shown", {"refusal": "no"})) == Said("", {}, 0)
    transcript.take(Piece(finish_reason="length", choice=1))
    assert transcript.finish() == [Said("", {}, 0), Said("E", {}, 1)]
    assert [(choice.text, choice.finish_reason, choice.message) for choice in transcript.choices] == [
        ("one ", "stop", {}),
        ("two E", "length", {}),
    ]


def test_chunks_of_several_choices_count_the_characters_of_each() -> None:
    progress, chunks = Progress(), []
    for said in (Said("ab"), Said("c", choice=1), Said("d", choice=1), Said("e")):
        chunks.append(progress.next_chunk(said))
        progress = progress.after(chunks[-1])
    assert [(chunk.index, chunk.choice, chunk.text_offset) for chunk in chunks] == [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 0, 2)]
    assert progress.text == "abe"


def test_a_replay_passes_on_only_what_is_new() -> None:
    replay = Replay("Hello")
    assert [replay.strip(text) for text in ("He", "llo wo", "rld")] == ["", " wo", "rld"]
    replay.finish()


def test_a_replay_that_says_something_else_is_an_interruption() -> None:
    with pytest.raises(GenerationInterruptedError):
        Replay("Hello").strip("Help")
    with pytest.raises(GenerationInterruptedError):
        Replay("Hello").finish()


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (EngineError(Problem(code="x", message="y")), Problem(code="x", message="y")),
        (GenerationCancelledError(), CANCELLED),
        (
            GenerationInterruptedError("why."),
            Problem(code="generation_interrupted", message="The generation was interrupted: why.", status=502),
        ),
        (TimeoutError(), DEADLINE_EXCEEDED),
        (InvalidError("bad", "It is bad.", "n"), Problem(code="bad", message="It is bad.", param="n", status=400)),
        (ZeroDivisionError("secret"), INTERNAL),
        (RetryableError("later"), INTERNAL),
    ],
)
def test_what_the_asker_is_told(error: Exception, problem: Problem) -> None:
    assert problem_of(error) == problem


def ready(leased_job: LeaseJob, **keywords: object) -> GenerationReady:
    return leased_job("up", **keywords).ready


def test_usage_prefers_the_providers_own_figures(leased_job: LeaseJob) -> None:
    transcript = spoken(Piece("a", figures=TokenFigures(11, 5, "provider")))
    assert usage_of(ready(leased_job), transcript, 1) == Usage(prompt_tokens=11, completion_tokens=5, source="provider")


def test_usage_is_counted_only_where_the_encoding_is_the_models_own(leased_job: LeaseJob) -> None:
    assert usage_of(ready(leased_job), spoken(Piece("a")), 1) == Usage(prompt_tokens=7, completion_tokens=1, source="counted")
    assert usage_of(ready(leased_job, exact=False), spoken(Piece("a")), 1).source == "estimated"
    assert usage_of(ready(leased_job), spoken(Piece("a")), 1, 5) == Usage(prompt_tokens=12, completion_tokens=1, source="estimated")
    assert usage_of(ready(leased_job), spoken(Piece("a", {"tool_calls": []})), 1).source == "estimated"


def test_the_completed_event(leased_job: LeaseJob) -> None:
    job = leased_job("up")
    transcript = spoken(Piece("Hi", {"refusal": "no"}, "content_filter", source_ids=("m1",)))
    usage = Usage(prompt_tokens=1, completion_tokens=1, source="counted")
    event = completed(job.ready, 2, Progress(4, 1, "Hi"), transcript, usage)
    assert (event.text, event.finish_reason, event.last_index, event.attempt) == ("Hi", "content_filter", 4, 2)
    assert (event.message, event.source_ids) == ({"refusal": "no"}, ("m1",))


def test_the_completed_event_of_several_choices(leased_job: LeaseJob) -> None:
    transcript = Transcript(choices=2)
    for piece in (Piece("a", finish_reason="stop"), Piece("b", {"refusal": "no"}, "length", choice=1)):
        transcript.take(piece)
    event = completed(leased_job("up").ready, 1, Progress(), transcript, Usage(prompt_tokens=1, completion_tokens=2, source="counted"))
    assert event.further == (FurtherChoice(text="b", finish_reason="length", message={"refusal": "no"}),)


def test_what_one_event_cannot_hold(leased_job: LeaseJob) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1, source="counted")
    many: Any = {"logprobs": {"content": [{"token": "x" * 100, "logprob": -1.0}] * 3_000}, "citations": ["a"]}
    streamed = completed(leased_job("up").ready, 1, Progress(), spoken(Piece("a", many)), usage)
    assert streamed.message == {"citations": ["a"]}
    with pytest.raises(EngineError) as refused:
        completed(leased_job("up", stream=False).ready, 1, Progress(), spoken(Piece("a", many)), usage)
    assert refused.value.code == "answer_too_large"
