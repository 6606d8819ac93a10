"""Chat completions and completions: every field of the published API, and `tessera`.

A field is honoured, handed to the provider as it came, or refused with the reason. Hints that cannot change an answer are accepted
everywhere. What each field comes to is written in docs/api.md, and a test compares that table with these classes.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from tessera.contracts.events import ChatMessage, GenerationParameters, MemoryGrounding, ModelReference
from tessera.gateway.domain.errors import ApiError, unsupported
from tessera.gateway.domain.keys import OnDisconnect
from tessera.gateway.routes.schemas.common import Body, Metadata, ModelId, Object, Real, Tokens, Truth, View, Whole, Wide, examples
from tessera.gateway.routes.schemas.consistency import ConsistencyOptions, ReadView

LOCAL_PROVIDER: Final = "local"

# Hints for a provider's operation: no answer depends on them, so an engine may leave them aside.
_HINTS: Final = frozenset(
    {
        "user",
        "safety_identifier",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
# What changes the answer: handed to a remote provider, refused for the local engines. The value is the one that asks for nothing.
_PROVIDER_ONLY: Final[Mapping[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
# What an answer would need that no event carries: sound, and judgements of the provider's own.
_NOWHERE: Final[Mapping[str, tuple[Any, ...]]] = {"modalities": (["text"],), "audio": (), "moderation": ()}
_NOT_KEPT: Final = {"model", "stream", "stream_options", "store", "tessera"}
_TEXT_PARTS: Final = ("text", "refusal")

StopSequence = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class MemoryOptions(Body):
    """Ground the answer on recalled memories. Without this object memory is not asked."""

    query: Annotated[
        str | None, Field(min_length=1, max_length=10_000, description="What to recall; the last user message where absent.")
    ] = None
    limit: Annotated[Whole, Field(ge=1, le=50)] = 5
    token_budget: Annotated[Whole, Field(ge=1, le=100_000)] = 2_000
    conversation_id: Annotated[str | None, Field(min_length=1, max_length=128, description="Only memories of this conversation.")] = None
    consistency: Annotated[
        ConsistencyOptions | None,
        Field(description="What memory must hold; waits for it, or fails, before anything is generated."),
    ] = None


class TesseraOptions(Body):
    """What the published API has no words for."""

    memory: MemoryOptions | None = None
    on_disconnect: Annotated[
        OnDisconnect | None,
        Field(description="What happens when the client leaves: `finish` lets the generation end; else as the key says, or `cancel`."),
    ] = None


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: Truth | None = None
    include_obfuscation: Truth | None = None


class GenerationBody(Body):
    """Fields that chat completions and completions share."""

    model: ModelId
    max_tokens: Annotated[Whole | None, Field(ge=1)] = None
    temperature: Annotated[Real | None, Field(ge=0, le=2)] = None
    top_p: Annotated[Real | None, Field(gt=0, le=1)] = None
    stop: StopSequence | Annotated[list[StopSequence], Field(max_length=4)] | None = None
    seed: Wide | None = None
    stream: Truth | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Whole | None, Field(ge=1, le=128)] = None
    frequency_penalty: Annotated[Real | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[Real | None, Field(ge=-2, le=2)] = None
    logit_bias: dict[str, Annotated[Real, Field(ge=-100, le=100)]] | None = None
    user: Annotated[str | None, Field(max_length=512)] = None
    tessera: TesseraOptions | None = None

    @property
    def streams(self) -> bool:
        """Whether server-sent events are wanted."""
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with the figures."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_obfuscation(self) -> bool:
        """Whether the chunks of a stream are padded, so that their sizes do not tell their text."""
        return bool(self.stream_options and self.stream_options.include_obfuscation)

    @property
    def keeps(self) -> bool:
        """Whether the answer is to be kept."""
        return False

    def kept(self) -> Object:
        """What of the request is kept with its answer."""
        return self.model_dump(mode="json", exclude_unset=True, exclude_none=True, by_alias=True, exclude=_NOT_KEPT)

    def check(self, model: ModelReference) -> None:
        """Raises ApiError 400 for what this model's path cannot honour."""
        if self.stream_options is not None and not self.streams:
            raise unsupported("stream_options", "It is only allowed when 'stream' is enabled.")
        self._refuse(_NOWHERE, "Answers are text here.")
        if model.provider.startswith(LOCAL_PROVIDER):
            self._refuse({"n": (1,), **_PROVIDER_ONLY}, f"The model '{model.model_id}' cannot honour it.")

    def parameters(self) -> GenerationParameters:
        """How to generate, as it travels to the provider."""
        return GenerationParameters(
            max_tokens=self.token_limit,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=self._stops(),
            seed=self.seed,
            n=self.n if self.n != 1 else None,
            extra=self._extra(),
        )

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate."""
        return self.max_tokens

    def most_generated(self) -> int | None:
        """The most tokens of all choices together; None where the request does not say."""
        return None if self.token_limit is None else self.token_limit * (self.n or 1)

    def end_user(self) -> str | None:
        """Who asks, in the words of the tenant's application."""
        return self.user

    def grounding(self) -> MemoryGrounding | None:
        """What to recall; None where memory is not asked."""
        options = self.tessera.memory if self.tessera else None
        return None if options is None else MemoryGrounding.model_validate(options.model_dump(exclude={"consistency"}))

    @property
    def on_disconnect(self) -> OnDisconnect | None:
        """What a client's leaving means; None where the request does not say."""
        return self.tessera.on_disconnect if self.tessera else None

    @property
    def consistency(self) -> ConsistencyOptions | None:
        """How fresh memory has to be; None where that is not asked."""
        return self.tessera.memory.consistency if self.tessera and self.tessera.memory else None

    def _stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _refuse(self, refused: Mapping[str, tuple[Any, ...]], why: str) -> None:
        given = self.model_dump(include=set(refused), exclude_unset=True, by_alias=True)
        for name, neutral in refused.items():
            value = given.get(name)
            if value is not None and not any(_same(value, harmless) for harmless in neutral):
                raise unsupported(name, why)

    def _extra(self) -> dict[str, JsonValue]:
        given = self.model_dump(include={*_HINTS, *_PROVIDER_ONLY}, exclude_unset=True, by_alias=True)
        return {name: value for name, value in given.items() if value is not None}


def _same(value: Any, other: Any) -> bool:
    """Equal, and of the same kind: `logprobs: 0` asks for something, `false` does not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _told_by(name: str, kind: Object) -> Object:
    return {"required": [name], "properties": {"role": {"const": "assistant"}, name: kind}}


class MessageBody(Body):
    """One message of a chat: with content, unless the assistant called something or refused."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
                _told_by("tool_calls", {"type": "array", "minItems": 1}),
                _told_by("function_call", {"type": "object", "minProperties": 1}),
                _told_by("refusal", {"type": "string", "minLength": 1}),
            ]
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | Annotated[list[Object], Field(min_length=1, max_length=256)] | None,
        Field(description="Text, or the parts of the published API."),
    ] = None
    name: Annotated[str | None, Field(min_length=1, max_length=128)] = None
    tool_calls: Annotated[list[Object] | None, Field(max_length=128)] = None
    tool_call_id: Annotated[str | None, Field(min_length=1, max_length=128)] = None
    refusal: str | None = None
    annotations: list[Object] | None = None
    function_call: Object | None = None
    audio: Object | None = None

    def checked(self, position: int) -> ChatMessage:
        """The message as it travels. Raises ApiError 400 for what is missing or cannot be carried."""
        where = f"messages[{position}]"
        if self.audio is not None:
            raise unsupported(f"{where}.audio", "Give its transcript as text.")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.function_call or self.refusal)):
            raise ApiError(400, "missing_required_parameter", f"Missing required parameter: '{where}.content'.", param=f"{where}.content")
        return ChatMessage(
            role=self.role,
            content=tuple(self.content) if isinstance(self.content, list) else self.content,
            name=self.name,
            tool_calls=None if self.tool_calls is None else tuple(self.tool_calls),
            tool_call_id=self.tool_call_id,
            refusal=self.refusal,
            function_call=self.function_call,
        )

    def refuse_parts_beside_text(self, position: int, model: ModelReference) -> None:
        """Raises ApiError 400 for an image or a file, which an engine that reads only text would pass over."""
        for part, content in enumerate(self.content if isinstance(self.content, list) else ()):
            if content.get("type") not in _TEXT_PARTS:
                where = f"messages[{position}].content[{part}]"
                raise ApiError(400, "unsupported_value", f"Invalid '{where}': the model '{model.model_id}' reads only text.", param=where)


class JsonSchemaFormat(BaseModel):
    """A schema, as the provider understands it."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[Object | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """How the answer is to be written: text, any JSON object, or JSON that fits a schema."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
            ]
        },
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchemaFormat | None, Field(description="Where `type` is json_schema.")] = None


def _only_with(name: str, condition: str) -> ApiError:
    return unsupported(name, f"It is only allowed when {condition}.")


class ChatCompletionBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    model_config = examples(
        {
            "model": "local/quote",
            "messages": [{"role": "user", "content": "Where is the key to the archive?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "tessera": {"memory": {"limit": 5}},
        }
    )

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[Whole | None, Field(ge=1)] = None
    audio: Object | None = None
    function_call: str | Object | None = None
    functions: list[Object] | None = None
    logprobs: Truth | None = None
    top_logprobs: Annotated[Whole | None, Field(ge=0, le=20)] = None
    metadata: Annotated[Metadata | None, Field(description="Kept with the answer: only with `store`.")] = None
    modalities: list[Literal["text", "audio"]] | None = None
    moderation: Object | None = None
    parallel_tool_calls: Truth | None = None
    prediction: Object | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Object | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    reasoning_effort: Annotated[str | None, Field(max_length=32)] = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: Annotated[Truth | None, Field(description="Keep the answer: see `GET /v1/chat/completions`.")] = None
    tool_choice: str | Object | None = None
    tools: Annotated[list[Object] | None, Field(max_length=128)] = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: Object | None = None

    @property
    def keeps(self) -> bool:
        """With `store`."""
        return bool(self.store)

    @property
    def token_limit(self) -> int | None:
        """Its newer name counts too."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def end_user(self) -> str | None:
        """`safety_identifier` has taken the place of `user` in the published API."""
        return self.user if self.safety_identifier is None else self.safety_identifier

    def check(self, model: ModelReference) -> None:
        """Raises ApiError 400 for what this model's path cannot honour."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise unsupported("max_tokens", "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.")
        self._check_companions()
        super().check(model)
        if model.provider.startswith(LOCAL_PROVIDER):
            for position, message in enumerate(self.messages):
                message.refuse_parts_beside_text(position, model)

    def _check_companions(self) -> None:
        """Fields that mean nothing without another one."""
        if self.metadata and not self.store:
            raise _only_with("metadata", "'store' is enabled")
        if self.top_logprobs and not self.logprobs:
            raise _only_with("top_logprobs", "'logprobs' is enabled")
        if not self.tools:
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) not in (None, "none", "auto"):
                    raise _only_with(name, "'tools' are specified")
        if self.response_format is not None and self.response_format.type == "json_schema" and self.response_format.json_schema is None:
            param = "response_format.json_schema"
            raise ApiError(400, "missing_required_parameter", f"Missing required parameter: '{param}'.", param=param)

    def checked_messages(self) -> tuple[ChatMessage, ...]:
        """The messages as they travel."""
        return tuple(message.checked(position) for position, message in enumerate(self.messages))


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    model_config = examples({"model": "local/ngram", "prompt": "The archive", "max_tokens": 16, "stop": ["."]})

    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)],
        Field(description="A text, the token ids of one under the model's encoding, or a list with one of either."),
    ]
    best_of: Annotated[Whole | None, Field(ge=1, le=20)] = None
    echo: Truth | None = None
    logprobs: Annotated[Whole | None, Field(ge=0, le=5)] = None
    suffix: str | None = None

    def check(self, model: ModelReference) -> None:
        """Raises ApiError 400 for what this model's path cannot honour."""
        best_of, wanted = self.best_of or 1, self.n or 1
        if self.best_of is not None and best_of < wanted:
            raise ApiError(400, "invalid_value", f"Invalid 'best_of': it must be at least 'n' ({wanted}).", param="best_of")
        if best_of > 1 and self.streams:
            raise ApiError(400, "unsupported_value", "Results cannot be streamed when 'best_of' is greater than 1.", param="best_of")
        super().check(model)

    def one_prompt(self) -> str | list[int]:
        """A text, or the tokens of one. Raises ApiError 400 for several."""
        if isinstance(self.prompt, str):
            return self.prompt
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if tokens:
            return tokens
        prompts = [item for item in self.prompt if not isinstance(item, int)]
        if len(prompts) != 1:
            raise ApiError(400, "unsupported_value", "Give one prompt in a request: each is a generation of its own.", param="prompt")
        return prompts[0]


class UsageView(View):
    """Tokens, and where the figures come from."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    source: Literal["counted", "provider", "estimated"]


class GroundingView(View):
    """What memory contributed."""

    recall: Literal["not_asked", "complete", "degraded"]
    source_ids: list[str]
    consistency: Annotated[ReadView | None, Field(description="How fresh memory was; only where that was asked for.")] = None


class AssistantMessageView(View):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoiceView(View):
    """One answer."""

    index: int
    message: AssistantMessageView
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
    logprobs: Object | None


class ChatCompletionView(View):
    """An answer that was not streamed; a stream sends `chat.completion.chunk` objects as server-sent events."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceView]
    usage: UsageView
    system_fingerprint: str | None
    tessera: GroundingView


class TextChoiceView(View):
    """One completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls", "function_call"] | None
    logprobs: Object | None


class CompletionView(View):
    """A text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoiceView]
    usage: UsageView
    system_fingerprint: str | None
    tessera: GroundingView
