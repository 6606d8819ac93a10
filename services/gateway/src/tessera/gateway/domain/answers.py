"""OpenAI's answer objects: chat completions, text completions and their chunks, as plain JSON values."""

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from tessera.contracts import opened
from tessera.contracts.events import FinishReason, FurtherChoice, GenerationChunk, GenerationCompleted, GenerationFailed, Usage
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.errors import ApiError, of_problem
from tessera.gateway.domain.frames import DONE, FrameId, data_frame

Json = dict[str, Any]
Form = Literal["chat", "text"]


@dataclass(frozen=True)
class Ending:
    """One choice as it ended; `extra` are the provider's other fields."""

    text: str
    reason: FinishReason
    extra: Json

    @property
    def logprobs(self) -> Any:
        """The log probabilities as the provider gave them, or None."""
        return self.extra.get("logprobs")

    @property
    def finish_reason(self) -> str:
        """A function call (what tools replaced) has a reason of its own, which the log does not know."""
        return "function_call" if self.reason == "stop" and self.extra.get("function_call") else self.reason

    def chat_message(self) -> Json:
        """The assistant's message; a provider's other fields (tool calls) pass through."""
        extra = {name: value for name, value in self.extra.items() if name != "logprobs"}
        if isinstance(calls := extra.get("tool_calls"), list):
            extra["tool_calls"] = [_without_index(call) for call in calls]
        wordless = any(extra.get(name) for name in ("tool_calls", "function_call", "refusal"))
        return {"refusal": None, **extra, "role": "assistant", "content": None if wordless and not self.text else self.text}


def endings(completed: GenerationCompleted) -> list[Ending]:
    """Every choice, in order."""
    choices: tuple[GenerationCompleted | FurtherChoice, ...] = (completed, *(completed.further or ()))
    return [Ending(opened(choice.text), choice.finish_reason, dict(choice.message or {})) for choice in choices]


def _without_index(call: Any) -> Any:
    """`index` tells apart the calls of a stream; a whole message has none."""
    return {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call


def _padding() -> str:
    return secrets.token_urlsafe(24)[: 1 + secrets.randbelow(32)]


@dataclass(frozen=True)
class Answer:
    """What every chunk of one answer repeats."""

    form: Form
    generation_id: str
    model_id: str
    created: int
    include_usage: bool = False
    obfuscated: bool = False
    """Whether each chunk of a stream is padded, so that its size does not tell its text."""
    consistency: Json | None = None
    """How fresh memory was, where that was asked for."""

    @property
    def id(self) -> str:
        """The id that clients see: it tells nothing but the generation."""
        return f"{'chatcmpl' if self.form == 'chat' else 'cmpl'}-{self.generation_id}"

    def whole(self, completed: GenerationCompleted) -> Json:
        """The answer of a request that does not stream."""
        return {
            **self._head("chat.completion" if self.form == "chat" else "text_completion"),
            "choices": [self._choice(index, ending) for index, ending in enumerate(endings(completed))],
            "usage": usage_object(completed.usage),
            "system_fingerprint": None,
            "tessera": self.grounding(completed),
        }

    def grounding(self, completed: GenerationCompleted) -> Json:
        """What memory contributed."""
        grounding = {"recall": completed.recall, "source_ids": list(completed.source_ids)}
        return grounding if self.consistency is None else {**grounding, "consistency": self.consistency}

    def chunk(self, content: Json, choice: int = 0, logprobs: object = None, finish_reason: str | None = None) -> Json:
        """One piece of a streamed answer; `content` is the delta of a chat or the text of a completion."""
        said = {"index": choice, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        padding = {"obfuscation": _padding()} if self.obfuscated else {}
        return {**self._chunk_head(), "choices": [said], **({"usage": None} if self.include_usage else {}), **padding}

    def usage_chunk(self, usage: Usage) -> Json:
        """The extra chunk that `include_usage` asks for: empty choices, the figures."""
        return {**self._chunk_head(), "choices": [], "usage": usage_object(usage)}

    def piece(self, text: str) -> Json:
        """The content of a chunk that carries only text."""
        return {"delta": {"content": text}} if self.form == "chat" else {"text": text}

    def _chunk_head(self) -> Json:
        return {**self._head("chat.completion.chunk" if self.form == "chat" else "text_completion"), "system_fingerprint": None}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model_id}

    def _choice(self, index: int, ending: Ending) -> Json:
        said = {"text": ending.text} if self.form == "text" else {"message": ending.chat_message()}
        return {"index": index, **said, "logprobs": ending.logprobs, "finish_reason": ending.finish_reason}


class StreamedAnswer:
    """Turns assembled replies into server-sent events. One per stream."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._opened: set[int] = set()

    def frames(self, reply: Located) -> list[bytes]:
        """The frames of one reply. After an ending nothing may follow."""
        return [frame for _, frame in self.located(reply)]

    def located(self, reply: Located) -> list[tuple[FrameId | None, bytes]]:
        """The same, each with its place; the mark of the end has none. The same reply gives the same places again."""
        framed: list[tuple[FrameId | None, bytes]] = []
        for index, content in enumerate(self._contents(reply)):
            place = FrameId(self._answer.generation_id, reply.partition, reply.offset, index)
            framed.append((place, data_frame(content, place)))
        return [*framed, (None, DONE)] if isinstance(reply.data, GenerationCompleted) else framed

    def _contents(self, reply: Located) -> list[Json]:
        data = reply.data
        if isinstance(data, GenerationFailed):
            return [dict(of_problem(data.problem).body())]
        return self._pieces(data) if isinstance(data, GenerationChunk) else self._ending(data)

    def _opening(self, choice: int) -> list[Json]:
        """Each choice of a chat begins with a chunk that says who speaks."""
        if self._answer.form == "text" or choice in self._opened:
            return []
        self._opened.add(choice)
        return [self._answer.chunk({"delta": {"role": "assistant", "content": "", "refusal": None}}, choice)]

    def _pieces(self, chunk: GenerationChunk) -> list[Json]:
        choice, text, delta = chunk.choice or 0, opened(chunk.text), dict(chunk.delta or {})
        logprobs = delta.pop("logprobs", None)
        pieces = [self._answer.chunk(self._answer.piece(text), choice, logprobs)] if text or logprobs else []
        if delta and self._answer.form == "chat":
            pieces.append(self._answer.chunk({"delta": delta}, choice))
        return [*self._opening(choice), *pieces]

    def _ending(self, completed: GenerationCompleted) -> list[Json]:
        answer, chunks = self._answer, list[Json]()
        for choice, ending in enumerate(endings(completed)):
            nothing: Json = {"delta": {}} if answer.form == "chat" else {"text": ""}
            chunks += [*self._opening(choice), answer.chunk(nothing, choice, finish_reason=ending.finish_reason)]
        chunks[-1] |= {"tessera": answer.grounding(completed)}
        return [*chunks, answer.usage_chunk(completed.usage)] if answer.include_usage else chunks


def error_frame(error: ApiError) -> bytes:
    """The error event that ends a stream which cannot be finished."""
    return data_frame(error.body())


def usage_object(usage: Usage) -> Json:
    """OpenAI's figures, and where they come from (`counted`, `provider` or `estimated`)."""
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
        "source": usage.source,
        **(usage.details or {}),
    }
