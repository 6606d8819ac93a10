"""One request to a model, from the gateway to the last chunk."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, JsonValue, model_validator

from tessera.contracts.base import EventData, Moment, Name, Record, RequestData, Text
from tessera.contracts.errors import Problem
from tessera.contracts.events.consistency import ReadConsistency
from tessera.contracts.events.memory import RecalledMemory, RecallState
from tessera.contracts.sealing import Sealable

Capability = Literal["chat", "completion", "embedding"]
OPERATION: Final[Mapping[Capability, str]] = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}
"""`gen_ai.operation.name` of OpenTelemetry's semantic conventions."""
UsageSource = Literal["counted", "provider", "estimated"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
GENERATION_CANCELLED: Final = "generation_cancelled"
"""The code of the problem that ends a cancelled generation."""


class ModelReference(Record):
    """The model as it was declared when the request was accepted."""

    model_id: Name
    provider: Name
    capability: Capability
    encoding: Annotated[Name, Field(description="Encoding that tokens are counted in.")]
    template: Annotated[Name, Field(description="How messages become tokens: openai-chat, plain or text.")]
    exact: Annotated[bool, Field(description="The declared encoding is the model's own, so counts are not estimates.")]
    context_tokens: Annotated[int | None, Field(ge=1)] = None


class ModelDeclared(EventData):
    """The generator (or memory, for embeddings) offers a model; keyed by its id on a compacted topic."""

    event_type: ClassVar[str] = "tessera.model.declared.v1"

    model: ModelReference
    description: Annotated[str, Field(max_length=1_000)]
    owned_by: Name
    available: bool = True


class ChatMessage(Record):
    """One message of a chat. `content` is text, or the parts of the published API, passed through."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Sealable[Text] | tuple[dict[str, JsonValue], ...] | None = None
    name: Name | None = None
    tool_calls: tuple[dict[str, JsonValue], ...] | None = None
    tool_call_id: Name | None = None
    refusal: Text | None = None
    function_call: Annotated[dict[str, JsonValue] | None, Field(description="What tool_calls replaced.")] = None


class MemoryGrounding(Record):
    """Ask for recalled memories with the generation."""

    query: Annotated[Text | None, Field(max_length=10_000, description="The last user message where absent.")] = None
    limit: Annotated[int, Field(ge=1, le=50)] = 5
    token_budget: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    conversation_id: Name | None = None
    consistency: Annotated[ReadConsistency | None, Field(description="Fails the generation where recall is less fresh.")] = None


class GenerationParameters(Record):
    """How to generate. `extra` goes to the provider as it came."""

    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=512)], ...], Field(max_length=4)] = ()
    seed: int | None = None
    n: Annotated[int | None, Field(ge=1, le=128, description="How many choices; one where absent.")] = None
    extra: dict[str, JsonValue] = {}


class CallerIdentity(Record):
    """On whose account a generation goes, beside its tenant."""

    credential_id: Annotated[Name, Field(description="Id of the API key, or of what stood in its place.")]
    user: Annotated[Text | None, Field(max_length=512, description="The end user that the request named.")] = None


class StreamOptions(Record):
    """What a stream shows beside its pieces, so that any replica can show it again."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequested(RequestData):
    """A generation was accepted. Exactly one of `messages` and `prompt` is given."""

    event_type: ClassVar[str] = "tessera.generation.requested.v1"

    generation_id: Name
    model: ModelReference
    messages: Annotated[tuple[ChatMessage, ...] | None, Field(min_length=1)] = None
    prompt: Sealable[Text] | None = None
    parameters: GenerationParameters = GenerationParameters()
    stream: bool = False
    memory: MemoryGrounding | None = None
    asked_model: Annotated[Name | None, Field(description="The model's name in the request, where that is another.")] = None
    stream_options: StreamOptions | None = None
    caller: CallerIdentity | None = None
    accepted_at: Moment | None = None
    reply_offset: Annotated[int | None, Field(ge=0, description="A place in the reply partition before every reply to this.")] = None

    @model_validator(mode="after")
    def _exactly_one(self) -> GenerationRequested:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give exactly one of messages and prompt")
        return self


class PromptTokens(Record):
    """The prompt's size under the model's declared encoding and template."""

    count: Annotated[int, Field(ge=0)]
    source: UsageSource


class GenerationTokenized(EventData):
    """The prompt is counted; memory grounds it next."""

    event_type: ClassVar[str] = "tessera.generation.tokenized.v1"

    request: GenerationRequested
    prompt: PromptTokens


class GenerationReady(EventData):
    """Everything a generator needs."""

    event_type: ClassVar[str] = "tessera.generation.ready.v1"

    request: GenerationRequested
    prompt: PromptTokens
    recall: RecallState = "not_asked"
    memories: tuple[RecalledMemory, ...] = ()


class GenerationCancelled(EventData):
    """Stop this generation; one that is not known yet is stopped when it arrives."""

    event_type: ClassVar[str] = "tessera.generation.cancelled.v1"

    generation_id: Name
    reason: Literal["client_disconnected", "client_request", "deadline"]


class GenerationChunk(EventData):
    """A coalesced piece of text. Readers drop lower attempts and repeated indexes."""

    event_type: ClassVar[str] = "tessera.generation.chunk.v1"

    generation_id: Name
    attempt: Annotated[int, Field(ge=1)]
    index: Annotated[int, Field(ge=0, description="Counts the chunks of the generation from 0, over all choices.")]
    choice: Annotated[int | None, Field(ge=0, le=127, description="Of which of several choices; the first where absent.")] = None
    text_offset: Annotated[int, Field(ge=0, description="Characters of the choice before this piece.")]
    text: Sealable[Text]
    delta: Annotated[dict[str, JsonValue] | None, Field(description="Other fields of a provider's delta, such as tool_calls.")] = None


class Usage(Record):
    """Tokens of a generation and where the figures come from."""

    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]
    source: UsageSource
    details: Annotated[
        dict[str, dict[str, JsonValue]] | None,
        Field(description="A provider's prompt_tokens_details and completion_tokens_details, such as cached and reasoning tokens."),
    ] = None


class FurtherChoice(Record):
    """One of several answers to the same request, beside the first."""

    text: Sealable[Text]
    finish_reason: FinishReason
    message: Annotated[dict[str, JsonValue] | None, Field(description="Other fields of a provider's message.")] = None


class GenerationCompleted(EventData):
    """The generation ended well. `last_index` is -1 where no chunk was sent."""

    event_type: ClassVar[str] = "tessera.generation.completed.v1"

    generation_id: Name
    attempt: Annotated[int, Field(ge=1)]
    last_index: Annotated[int, Field(ge=-1)]
    model_id: Name
    text: Sealable[Text]
    finish_reason: FinishReason
    usage: Usage
    recall: RecallState = "not_asked"
    source_ids: Annotated[tuple[str, ...], Field(description="Memories that the answer was grounded on.")] = ()
    message: Annotated[dict[str, JsonValue] | None, Field(description="Other fields of a provider's message, such as tool_calls.")] = None
    further: Annotated[
        tuple[FurtherChoice, ...] | None, Field(max_length=127, description="The choices after the first, where several were asked for.")
    ] = None


class GenerationFailed(EventData):
    """The generation ended badly; what was sent before stands."""

    event_type: ClassVar[str] = "tessera.generation.failed.v1"

    generation_id: Name
    attempt: Annotated[int, Field(ge=1)] = 1
    last_index: Annotated[int, Field(ge=-1)] = -1
    problem: Problem
    usage: Usage | None = None


class GenerationEnded(EventData):
    """A generation is over, whoever still listens: what it came to and what it used, once for each generation."""

    event_type: ClassVar[str] = "tessera.generation.ended.v1"

    generation_id: Name
    outcome: Literal["completed", "failed", "cancelled"]
    model: ModelReference
    asked_model: Name | None = None
    caller: CallerIdentity | None = None
    usage: Annotated[Usage | None, Field(description="Absent where nothing was generated.")] = None
    finish_reason: FinishReason | None = None
    problem: Problem | None = None
    accepted_at: Moment | None = None
    ended_at: Moment

    @classmethod
    def of(cls, request: GenerationRequested, ending: GenerationCompleted | GenerationFailed, ended_at: datetime) -> GenerationEnded:
        """How `request` ended. Where it may be emitted twice, `ended_at` has to be the same each time."""
        problem = ending.problem if isinstance(ending, GenerationFailed) else None
        unhappy: Literal["failed", "cancelled"] = "cancelled" if problem and problem.code == GENERATION_CANCELLED else "failed"
        return cls(
            generation_id=request.generation_id,
            outcome="completed" if problem is None else unhappy,
            model=request.model,
            asked_model=request.asked_model,
            caller=request.caller,
            usage=ending.usage,
            finish_reason=None if isinstance(ending, GenerationFailed) else ending.finish_reason,
            problem=problem,
            accepted_at=request.accepted_at,
            ended_at=ended_at,
        )


class RequestFailed(EventData):
    """Any request's answer when it cannot be answered."""

    event_type: ClassVar[str] = "tessera.request.failed.v1"

    problem: Problem
