"""What an OpenAI-compatible provider answers, read without trust: events of its stream, whole completions, errors.

Source: the OpenAI API reference for chat completions and (legacy) completions; deviations of vLLM, llama.cpp, Ollama and Perplexity that
were met in practice: no usage, usage on a chunk with choices, `code` as a number, an error inside a stream that began with 200, a stream
that just ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast, get_args

from tessera.contracts import FinishReason, Problem
from tessera.generator.domain.endings import EngineError
from tessera.generator.domain.pieces import Delta, Piece, TokenFigures

DONE: Final = b"[DONE]"
_KNOWN_TOP_LEVEL: Final = frozenset({"id", "object", "created", "model", "choices", "usage", "error", "system_fingerprint", "service_tier"})
_KNOWN_IN_MESSAGE: Final = frozenset({"role", "content"})
_FINISH_REASONS: Final = frozenset(get_args(FinishReason))
_USAGE_DETAILS: Final = ("prompt_tokens_details", "completion_tokens_details")
_CODE: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAXIMUM_MESSAGE: Final = 500


def malformed(what: str) -> EngineError:
    """The provider broke the protocol."""
    return EngineError(Problem(code="provider_malformed_answer", message=f"The provider's answer is malformed: {what}.", status=502))


def pieces_of(data: bytes, choices: int = 1) -> list[Piece]:
    """One event of a stream, or one whole completion, as pieces: one of each choice in it, of a single one where it names none.

    Raises EngineError for an error in it or a malformed one.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed("it is no JSON") from error
    if not isinstance(document, dict):
        raise malformed("it is no JSON object")
    if document.get("error"):
        raise EngineError(error_in_stream(document["error"]))
    said = _choices(document, choices) or [(0, {})]
    # What is not of a choice goes with one of them, once.
    common: Delta = {name: value for name, value in document.items() if name not in _KNOWN_TOP_LEVEL and value is not None}
    first, *rest = (_piece(index, choice) for index, choice in said)
    return [replace(first, delta=first.delta | common, figures=_figures(document.get("usage"))), *rest]


def _piece(index: int, choice: Mapping[str, Any]) -> Piece:
    said = choice.get("delta") or choice.get("message") or {}
    if not isinstance(said, dict):
        raise malformed("a choice has no object as its delta")
    delta: Delta = {name: value for name, value in said.items() if name not in _KNOWN_IN_MESSAGE and value is not None}
    if choice.get("logprobs") is not None:
        delta["logprobs"] = choice["logprobs"]
    text = _text(said.get("content", choice.get("text")))
    return Piece(text, delta, _finish_reason(choice.get("finish_reason")), choice=index)


def _choices(document: Mapping[str, Any], wanted: int) -> list[tuple[int, Mapping[str, Any]]]:
    """The choices that were asked for, by index; a chunk may have none (the one with the usage)."""
    choices = document.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise malformed("choices is no list of objects")
    found = {choice.get("index", 0): choice for choice in choices}
    return [(index, found[index]) for index in range(wanted) if index in found]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise malformed("a choice has no text as its content")
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _finish_reason(value: Any) -> FinishReason | None:
    """Reasons of a provider's own (`eos`, `end_turn`) mean that it stopped by itself."""
    if value is None:
        return None
    return cast(FinishReason, value) if value in _FINISH_REASONS else "stop"


def _figures(usage: Any) -> TokenFigures | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(prompt, int) and isinstance(completion, int) and prompt >= 0 and completion >= 0):
        return None
    details = {name: usage[name] for name in _USAGE_DETAILS if isinstance(usage.get(name), dict)}
    return TokenFigures(prompt, completion, "provider", details)


def error_in_stream(error: Any) -> Problem:
    """The problem for an error that came after the stream had begun."""
    return Problem(code="provider_error", message=f"The provider failed: {_message(error)}", status=502)


def problem_of_status(status: int, body: bytes) -> Problem:
    """The problem for an answer that is not 200. What is the operator's fault is not shown in detail to the asker."""
    error = _error_of(body)
    if status in (401, 403):
        return _operators("provider_authentication_failed", "The provider refused our credentials; the operator must mend them.")
    if status == 404:
        return _operators("provider_model_not_found", "The provider does not know this model or path; the operator must mend it.")
    if status == 429:
        return Problem(code="provider_rate_limited", message=f"The provider is busy: {_message(error)}", status=429)
    if status in (400, 413, 422):
        return Problem(code=_refusal_code(error), message=_message(error), param=_param(error), status=400)
    return Problem(code="provider_error", message=f"The provider answered {status}: {_message(error)}", status=502)


def _operators(code: str, message: str) -> Problem:
    return Problem(code=code, message=message, status=502)


def _refusal_code(error: Any) -> str:
    """The provider's own code, such as `context_length_exceeded`, where it has one that is a word."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else "provider_refused_request"


def _param(error: Any) -> str | None:
    param = error.get("param") if isinstance(error, dict) else None
    return param[:256] if isinstance(param, str) else None


def _error_of(body: bytes) -> Any:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", errors="replace")
    return document.get("error", document) if isinstance(document, dict) else document


def _message(error: Any) -> str:
    """The provider's own words, shortened."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or "no reason given"
    return (error if isinstance(error, str) else json.dumps(error))[:_MAXIMUM_MESSAGE].replace("\x00", "")
