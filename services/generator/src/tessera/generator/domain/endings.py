"""How a generation ends: the events, the problems, the usage."""

from __future__ import annotations

import json
from typing import Final

from tessera.contracts import (
    GENERATION_CANCELLED,
    FinishReason,
    FurtherChoice,
    GenerationCompleted,
    GenerationFailed,
    GenerationReady,
    InvalidError,
    Problem,
    RetryableError,
    Usage,
)
from tessera.generator.domain.pieces import Delta
from tessera.generator.domain.transcript import ChoiceTranscript, Progress, Transcript

CANCELLED: Final = Problem(code=GENERATION_CANCELLED, message="The generation was cancelled.", status=499)
EXPIRED: Final = Problem(code="expired", message="The deadline passed before the generation began.", status=504)
DEADLINE_EXCEEDED: Final = Problem(code="deadline_exceeded", message="The deadline passed before the generation ended.", status=504)
ABANDONED: Final = Problem(
    code="generation_abandoned", message="Every worker that ran this generation died with it; it is not tried again.", status=500
)
INTERNAL: Final = Problem(code="internal_error", message="The generation failed for a reason of our own.", status=500)
TOO_LARGE: Final = Problem(
    code="answer_too_large",
    message="The answer is larger than one event: ask for fewer choices, fewer log probabilities, or a stream.",
    status=502,
)
MAXIMUM_MESSAGE_BYTES: Final = 256 * 1024
"""What an answer's other fields may take beside its text, so that both fit into one event."""
_DEFAULT_FINISH_REASON: Final[FinishReason] = "stop"


class GenerationInterruptedError(InvalidError):
    """The stream broke after text was sent, and cannot be continued truthfully."""

    def __init__(self, reason: str) -> None:
        super().__init__("generation_interrupted", f"The generation was interrupted: {reason}")


class GenerationCancelledError(InvalidError):
    """Somebody asked for the generation to stop."""

    def __init__(self) -> None:
        super().__init__(CANCELLED.code, CANCELLED.message)


class LeaseLostError(RetryableError):
    """Another worker runs this job now; nothing more may be written for it here."""

    code = "lease_lost"


class EngineError(InvalidError):
    """An engine or provider cannot finish this generation; `problem` is what the asker is told."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.code, problem.message, problem.param)
        self.problem = problem


def problem_of(error: Exception) -> Problem:
    """What the asker is told about an error that ended a generation."""
    if isinstance(error, EngineError):
        return error.problem
    if isinstance(error, GenerationCancelledError):
        return CANCELLED
    if isinstance(error, GenerationInterruptedError):
        return Problem.of(error, status=502)
    if isinstance(error, TimeoutError):
        return DEADLINE_EXCEEDED
    if isinstance(error, InvalidError):
        return Problem.of(error, status=400)
    return INTERNAL


def completed(ready: GenerationReady, attempt: int, progress: Progress, transcript: Transcript, usage: Usage) -> GenerationCompleted:
    """The event of a generation that ended well. Raises EngineError `answer_too_large`."""
    messages = _messages(transcript, ready.request.stream)
    return GenerationCompleted(
        generation_id=ready.request.generation_id,
        attempt=attempt,
        last_index=progress.last_index,
        model_id=ready.request.model.model_id,
        text=transcript.text,
        finish_reason=transcript.choices[0].finish_reason or _DEFAULT_FINISH_REASON,
        usage=usage,
        recall=ready.recall,
        source_ids=transcript.source_ids,
        message=messages[0],
        further=tuple(map(_further, transcript.choices[1:], messages[1:])) or None,
    )


def _further(choice: ChoiceTranscript, message: Delta | None) -> FurtherChoice:
    return FurtherChoice(text=choice.text, finish_reason=choice.finish_reason or _DEFAULT_FINISH_REASON, message=message)


def _messages(transcript: Transcript, streamed: bool) -> list[Delta | None]:
    """Each choice's other fields, as far as one event holds them: a stream's log probabilities went with its chunks.

    Raises EngineError `answer_too_large`.
    """
    messages = [choice.message for choice in transcript.choices]
    if streamed and _size(messages) > MAXIMUM_MESSAGE_BYTES:
        messages = [{name: value for name, value in message.items() if name != "logprobs"} for message in messages]
    if _size(messages) > MAXIMUM_MESSAGE_BYTES:
        raise EngineError(TOO_LARGE)
    return [message or None for message in messages]


def _size(messages: list[Delta]) -> int:
    return len(json.dumps(messages)) if any(messages) else 0


def failed(generation_id: str, attempt: int, progress: Progress, problem: Problem, usage: Usage | None = None) -> GenerationFailed:
    """The event of a generation that ended badly."""
    return GenerationFailed(
        generation_id=generation_id, attempt=max(attempt, 1), last_index=progress.last_index, problem=problem, usage=usage
    )


def usage_of(ready: GenerationReady, transcript: Transcript, completion_tokens: int, grounding_tokens: int = 0) -> Usage:
    """The engine's own figures where it gave some, else our count: an estimate wherever the encoding is not the model's own.

    `grounding_tokens` are those of the memories that were put before the prompt, which was counted without them.
    """
    figures = transcript.figures
    if figures is not None:
        return Usage(
            prompt_tokens=figures.prompt_tokens,
            completion_tokens=figures.completion_tokens,
            source=figures.source,
            details=dict(figures.details) or None,
        )
    exact = (
        ready.request.model.exact
        and ready.prompt.source == "counted"
        and not any(choice.message for choice in transcript.choices)
        and not grounding_tokens
    )
    return Usage(
        prompt_tokens=ready.prompt.count + grounding_tokens,
        completion_tokens=completion_tokens,
        source="counted" if exact else "estimated",
    )


class Replay:
    """Checks that a repeated generation says again what was already sent, and passes on only what is new."""

    def __init__(self, sent: str) -> None:
        self._expected = sent

    def strip(self, text: str) -> str:
        """What of `text` was not sent before. Raises GenerationInterruptedError where it differs from what was sent."""
        shared = min(len(text), len(self._expected))
        if text[:shared] != self._expected[:shared]:
            raise GenerationInterruptedError("the engine learned in between and would now say something else.")
        self._expected = self._expected[shared:]
        return text[shared:]

    def finish(self) -> None:
        """Raises GenerationInterruptedError where the repeat ended before what was sent did."""
        if self._expected:
            raise GenerationInterruptedError("the engine learned in between and would now say less.")
