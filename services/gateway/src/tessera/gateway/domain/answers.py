"""OpenAI's answer objects: chat completions, text completions and their chunks, as plain JSON values."""

from dataclasses import dataclass
from typing import Any, Literal

from tessera.contracts import opened
from tessera.contracts.events import GenerationChunk, GenerationCompleted, GenerationFailed, Usage
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.errors import ApiError, of_problem
from tessera.gateway.domain.frames import DONE, FrameId, data_frame

Json = dict[str, Any]
Form = Literal["chat", "text"]


@dataclass(frozen=True)
class Answer:
    """What every chunk of one answer repeats."""

    form: Form
    generation_id: str
    model_id: str
    created: int
    include_usage: bool = False
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
            "choices": [self._choice(completed)],
            "usage": usage_object(completed.usage),
            "system_fingerprint": None,
            "tessera": self.grounding(completed),
        }

    def grounding(self, completed: GenerationCompleted) -> Json:
        """What memory contributed."""
        grounding = {"recall": completed.recall, "source_ids": list(completed.source_ids)}
        return grounding if self.consistency is None else {**grounding, "consistency": self.consistency}

    def chunk(self, content: Json, finish_reason: str | None = None) -> Json:
        """One piece of a streamed answer; `content` is the delta of a chat or the text of a completion."""
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._chunk_head(), "choices": [choice], **({"usage": None} if self.include_usage else {})}

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

    def _choice(self, completed: GenerationCompleted) -> Json:
        ending = {"logprobs": None, "finish_reason": completed.finish_reason}
        if self.form == "text":
            return {"index": 0, "text": opened(completed.text), **ending}
        return {"index": 0, "message": chat_message(completed), **ending}


class StreamedAnswer:
    """Turns assembled replies into server-sent events. One per stream."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._opened = False

    def frames(self, reply: Located) -> list[bytes]:
        """The frames of one reply. After an ending nothing may follow."""
        contents = self._contents(reply)
        framed = [
            data_frame(content, FrameId(self._answer.generation_id, reply.partition, reply.offset, index))
            for index, content in enumerate(contents)
        ]
        return [*framed, DONE] if isinstance(reply.data, GenerationCompleted) else framed

    def _contents(self, reply: Located) -> list[Json]:
        data = reply.data
        if isinstance(data, GenerationFailed):
            return [dict(of_problem(data.problem).body())]
        opening = self._opening()
        if isinstance(data, GenerationChunk):
            return [*opening, *self._pieces(data)]
        return [*opening, *self._ending(data)]

    def _opening(self) -> list[Json]:
        """A chat begins with a chunk that says who speaks."""
        first, self._opened = not self._opened, True
        if not first or self._answer.form == "text":
            return []
        return [self._answer.chunk({"delta": {"role": "assistant", "content": "", "refusal": None}})]

    def _pieces(self, chunk: GenerationChunk) -> list[Json]:
        text = opened(chunk.text)
        pieces = [self._answer.piece(text)] if text else []
        if chunk.delta and self._answer.form == "chat":
            pieces.append({"delta": dict(chunk.delta)})
        return [self._answer.chunk(piece) for piece in pieces]

    def _ending(self, completed: GenerationCompleted) -> list[Json]:
        answer = self._answer
        last = {
            **answer.chunk({"delta": {}} if answer.form == "chat" else {"text": ""}, completed.finish_reason),
            "tessera": answer.grounding(completed),
        }
        return [last, answer.usage_chunk(completed.usage)] if answer.include_usage else [last]


def error_frame(error: ApiError) -> bytes:
    """The error event that ends a stream which cannot be finished."""
    return data_frame(error.body())


def chat_message(completed: GenerationCompleted) -> Json:
    """The assistant's message; a provider's other fields (tool calls) pass through."""
    extra = dict(completed.message or {})
    text = opened(completed.text)
    content = None if not text and extra.get("tool_calls") else text
    return {"refusal": None, **extra, "role": "assistant", "content": content}


def usage_object(usage: Usage) -> Json:
    """OpenAI's figures, and where they come from (`counted`, `provider` or `estimated`)."""
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
        "source": usage.source,
    }
