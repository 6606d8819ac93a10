"""What an operator can set for the generator."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from tessera.bus.settings import ServiceSettings
from tessera.contracts import ModelReference
from tessera.encodings import ENCODING_NAMES, TEMPLATE_NAMES
from tessera.generator.domain.models import ModelCatalogue, OfferedModel, local_models
from tessera.generator.domain.policies import ProviderPolicy, WorkerPolicy
from tessera.resilience import RetryPolicy

Positive = Annotated[float, Field(gt=0)]


class ProviderModelSettings(BaseModel):
    """One model of a provider; its name alone is enough."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(min_length=1, max_length=128)]
    """The name that clients use."""
    upstream_name: str | None = None
    """The provider's own name, where it differs."""
    capability: Literal["chat", "completion"] = "chat"
    encoding: str = "o200k_base"
    """Encoding that tokens are counted in."""
    template: str | None = None
    """How messages become tokens; openai-chat for chat and text for completion where absent."""
    exact: bool = False
    """The encoding and template are the model's own, so that our counts are no estimates."""
    context_tokens: Annotated[int | None, Field(ge=1)] = None
    description: Annotated[str | None, Field(max_length=1_000)] = None

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        if value not in ENCODING_NAMES:
            raise ValueError(f"unknown encoding; known: {', '.join(ENCODING_NAMES)}")
        return value

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None and value not in TEMPLATE_NAMES:
            raise ValueError(f"unknown template; known: {', '.join(TEMPLATE_NAMES)}")
        return value

    def offered(self, provider: str) -> OfferedModel:
        """The model as it is declared."""
        reference = ModelReference(
            model_id=self.id,
            provider=provider,
            capability=self.capability,
            encoding=self.encoding,
            template=self.template or ("openai-chat" if self.capability == "chat" else "text"),
            exact=self.exact,
            context_tokens=self.context_tokens,
        )
        return OfferedModel(reference, self.description or f"{self.id}, served by {provider}.", provider, self.upstream_name or self.id)


class ProviderSettings(BaseModel):
    """One OpenAI-compatible provider."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
    base_url: HttpUrl
    """Up to and including `/v1` where the provider has it."""
    api_key: SecretStr | None = None
    models: Annotated[tuple[ProviderModelSettings, ...], Field(min_length=1)]
    concurrency: Annotated[int, Field(ge=1, le=1_000)] = 32
    """Generations at once, in each replica."""
    connect_timeout_seconds: Positive = 5.0
    read_timeout_seconds: Positive = 60.0
    """Longest silence of the provider."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Calls until one answers, the first included; an answer that has begun is never repeated."""
    maximum_retry_after_seconds: Annotated[float, Field(ge=0)] = 10.0
    """A provider that asks for a longer pause is not waited for."""
    breaker_failures: Annotated[int, Field(ge=1)] = 5
    breaker_reset_seconds: Positive = 15.0
    stream_usage: bool = True
    """Ask for the usage in the stream; off for servers that refuse `stream_options`."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the provider calls the most tokens of an answer: OpenAI's newer models refuse the older name, most servers know only it."""

    @field_validator("models", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return [{"id": item} if isinstance(item, str) else item for item in value] if isinstance(value, list | tuple) else value

    def offered(self) -> tuple[OfferedModel, ...]:
        """Its models as they are declared."""
        return tuple(model.offered(self.name) for model in self.models)

    def policy(self) -> ProviderPolicy:
        """How it is called."""
        return ProviderPolicy(
            connect_timeout=timedelta(seconds=self.connect_timeout_seconds),
            read_timeout=timedelta(seconds=self.read_timeout_seconds),
            retry=RetryPolicy(attempts=self.attempts, initial=timedelta(milliseconds=250), maximum=timedelta(seconds=5)),
            maximum_retry_after=timedelta(seconds=self.maximum_retry_after_seconds),
            breaker_failures=self.breaker_failures,
            breaker_reset=timedelta(seconds=self.breaker_reset_seconds),
            stream_usage=self.stream_usage,
            limit_field=self.limit_field,
        )


class GeneratorSettings(ServiceSettings, service="generator"):
    """All of the generator's settings. `TESSERA_GENERATOR__PROVIDERS` is a JSON list."""

    providers: tuple[ProviderSettings, ...] = ()
    encoding: Literal["o200k_base", "cl100k_base"] = "o200k_base"
    """Encoding of the local engines; local/ngram learns only texts that were tokenized under it."""
    ngram_concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Generations of local/ngram at once, each with a database connection of its own."""
    quote_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Of an engine's slots in one process, the most that one tenant may hold; below 1, one slot at least stays for others."""
    time_limit_seconds: Positive = 600.0
    """Of a generation whose request names no deadline."""
    lease_seconds: Annotated[float, Field(ge=1)] = 15.0
    """A job whose worker is silent for so long is taken over."""
    poll_seconds: Positive = 1.0
    """How long a lost wake-up may delay a job."""
    coalesce_milliseconds: Annotated[float, Field(ge=0, le=1_000)] = 45.0
    """Text that comes within it travels as one chunk; the first chunk never waits."""
    keep_finished_seconds: Positive = 86_400.0
    """How long the rows of ended jobs stay (without content), so that late duplicates find them."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [provider.name for provider in self.providers]
        if len(set(names)) != len(names):
            raise ValueError("providers: two providers have the same name")
        self.catalogue()
        return self

    def catalogue(self) -> ModelCatalogue:
        """Every model on offer. Raises ValueError where two share an id."""
        return ModelCatalogue([*local_models(self.encoding), *(model for provider in self.providers for model in provider.offered())])

    def worker_policy(self) -> WorkerPolicy:
        """How jobs are leased and sent."""
        return WorkerPolicy(
            lease=timedelta(seconds=self.lease_seconds),
            poll=timedelta(seconds=self.poll_seconds),
            coalesce=timedelta(milliseconds=self.coalesce_milliseconds),
            keep_finished=timedelta(seconds=self.keep_finished_seconds),
            tenant_share=self.tenant_share,
        )
