"""What an operator can set for the gateway."""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from tessera.bus.settings import ServiceSettings
from tessera.contracts.base import TenantId
from tessera.gateway.domain import keys
from tessera.gateway.domain.limits import MILLIONTHS, UNLIMITED, Allowance, Scope
from tessera.gateway.domain.names import ModelNames
from tessera.gateway.oidc_settings import OidcSettings
from tessera.storage import ListenerTls

DEVELOPMENT_PEPPER: Final = "tessera-development-pepper"
_SHORTEST_PEPPER: Final = 32


class SpoolSettings(BaseModel):
    """Where accepted events wait while Kafka is away, and how many."""

    model_config = ConfigDict(extra="forbid")

    folder: Path | None = None
    """Where the segments lie: on a disk that outlives the process. None: no spool, 503 while Kafka is away (docs/hand-off.md)."""
    ttl_seconds: Annotated[float, Field(gt=0)] = 86_400.0
    """An event that could not be handed over for longer is refused as expired. Longer than Kafka's client may still hold a copy."""
    maximum_bytes: Annotated[int, Field(ge=1_024 * 1_024)] = 256 * 1024 * 1024
    """Most bytes of segments that one process holds; 503 beyond."""
    segment_bytes: Annotated[int, Field(ge=4_096)] = 8 * 1024 * 1024
    """A segment that has reached this is closed. Space is given back by whole segments."""
    flush_milliseconds: Annotated[float, Field(ge=0, le=1_000)] = 2.0
    """How long a write waits for others, to share one fsync."""

    @field_validator("folder", mode="before")
    @classmethod
    def _given(cls, folder: object) -> object:
        """Compose files give an empty value where there is none."""
        return folder or None

    @model_validator(mode="after")
    def _holds_segments(self) -> Self:
        if self.segment_bytes > self.maximum_bytes:
            raise ValueError("segment_bytes must not exceed maximum_bytes")
        return self


class AllowanceSettings(BaseModel):
    """What each of a kind may use. Without a value nothing is counted (docs/limits.md)."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Prompt and answer together."""
    concurrent_streams: Annotated[int, Field(ge=1)] | None = None
    spend_per_day: Annotated[Decimal, Field(ge=Decimal("0.000001"), decimal_places=6)] | None = None
    """In the currency of PRICES, over the last 24 hours."""

    @field_validator("*", mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        """Compose files give an empty value where there is none."""
        return None if value == "" else value

    @property
    def allowance(self) -> Allowance:
        """As the gate takes it."""
        spend = None if self.spend_per_day is None else int(self.spend_per_day * MILLIONTHS)
        return Allowance(**{**self.model_dump(), "spend_per_day": spend})


class PriceSettings(BaseModel):
    """What a model costs for each million tokens, in the operator's currency."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[Decimal, Field(ge=0)]
    completion: Annotated[Decimal, Field(ge=0)]


class LimitSettings(BaseModel):
    """Limits, counted in Redis over every replica. Each caller has to be within all of them."""

    model_config = ConfigDict(extra="forbid")

    ip: AllowanceSettings = Field(default_factory=AllowanceSettings)
    """Of each client address; requests count before their key is known. Behind a proxy name it in FORWARDED_ALLOW_IPS."""
    key: AllowanceSettings = Field(default_factory=AllowanceSettings)
    """Of each API key."""
    user: AllowanceSettings = Field(default_factory=AllowanceSettings)
    """Of each `safety_identifier`, else `user`, that a generation of a tenant names."""
    tenant: AllowanceSettings = Field(default_factory=AllowanceSettings)
    """Of each tenant."""

    @property
    def allowances(self) -> Mapping[Scope, Allowance]:
        """Those that limit something."""
        every: Mapping[Scope, Allowance] = {
            "ip": self.ip.allowance,
            "key": self.key.allowance,
            "user": self.user.allowance,
            "tenant": self.tenant.allowance,
        }
        return {scope: allowance for scope, allowance in every.items() if allowance != UNLIMITED}


class GatewaySettings(ServiceSettings, service="gateway"):
    """The gateway's settings, on top of those that every service has."""

    serves_without_kafka: ClassVar[bool] = True
    reloadable: ClassVar[frozenset[str]] = ServiceSettings.reloadable | {"limits", "cors_origins", "model_aliases"}

    # A wrong key or pepper must not be repeated in the complaint about it.
    model_config = SettingsConfigDict(hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Several gateway processes may share it (SO_REUSEPORT)."""
    tls: ListenerTls = Field(default_factory=ListenerTls)
    key_pepper: SecretStr = SecretStr(DEVELOPMENT_PEPPER)
    """Secret under which API keys are hashed. Changing it makes every key invalid."""
    bootstrap_key: SecretStr | None = None
    """A key with every scope, made at start: for development and tests, refused in production.

    Print one with `python -m tessera.gateway.development_key`."""
    bootstrap_tenant: TenantId = "default"
    """The tenant of the bootstrap key."""
    authentication: Literal["required", "off"] = "required"
    """`off`: every request is the development tenant's, whatever key it shows, with every scope but `admin`. Refused in production."""
    development_tenant: TenantId = "default"
    """Whose requests they are while authentication is off."""
    generation_timeout_seconds: Annotated[float, Field(gt=0, le=3_600)] = 120.0
    keep_alive_seconds: Annotated[float, Field(gt=0, le=300)] = 15.0
    """How often a quiet stream shows that it lives."""
    question_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 15.0
    """Longest wait for another service's answer to anything but a generation."""
    publish_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Longest wait for Kafka to confirm an event."""
    body_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 30.0
    """Longest pause between two pieces of a request's body."""
    last_used_seconds: Annotated[float, Field(gt=0, le=3_600)] = 30.0
    """How often it is written down when keys were last used."""
    stored_completions_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    """How long a chat with `store` is kept."""
    generation_records_days: Annotated[float, Field(ge=1, le=36_500)] = 30.0
    """How long it is remembered what became of a generation. What was used by day is kept for good."""
    prices: Mapping[str, PriceSettings] = Field(default_factory=dict)
    """What models cost: `{"gpt-4.1": {"prompt": 2.0, "completion": 8.0}}` for each million tokens. A model without a price has no cost."""
    spool: SpoolSettings = Field(default_factory=SpoolSettings)
    cors_origins: frozenset[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]] = frozenset()
    """Origins whose pages may call from a browser, such as `["https://app.example.com"]`; `["*"]` for all. None by default."""
    limits: LimitSettings = Field(default_factory=LimitSettings)
    model_aliases: dict[str, str] = Field(default_factory=dict)
    """Other names of models, such as `{"gpt-4o": "my-model", "gpt-*": "my-model"}`: the longest pattern goes first (docs/models.md)."""
    oidc: OidcSettings = Field(default_factory=OidcSettings)
    maximum_body_bytes: Annotated[int, Field(ge=1_024)] = 1024 * 1024
    maximum_upload_bytes: Annotated[int, Field(ge=1_024)] = 256 * 1024 * 1024

    @field_validator("bootstrap_key")
    @classmethod
    def _whole(cls, key: SecretStr | None) -> SecretStr | None:
        """Compose files give an empty value where there is none."""
        if key is None or not key.get_secret_value():
            return None
        if keys.parse(key.get_secret_value()) is None:
            raise ValueError("not a key tsr_<env>_<id>_<secret><checksum>; print one with python -m tessera.gateway.development_key")
        return key

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        """Compose files give an empty value where there is none."""
        return {} if value == "" else value

    @field_validator("model_aliases")
    @classmethod
    def _can_be_meant(cls, targets: dict[str, str]) -> dict[str, str]:
        ModelNames(targets)
        return targets

    @model_validator(mode="after")
    def _refuses_after_the_last_copy(self) -> Self:
        if self.spool.ttl_seconds <= self.kafka.request_timeout_seconds:
            raise ValueError("spool.ttl_seconds must exceed kafka.request_timeout_seconds, else an event may arrive after it was refused")
        return self

    @model_validator(mode="after")
    def _fits_production(self) -> Self:
        if self.profile != "production":
            return self
        if self.authentication == "off":
            raise ValueError("authentication must not be off in the profile production: everybody would be the tenant development_tenant")
        if self.bootstrap_key is not None:
            raise ValueError("bootstrap_key is refused in the profile production; make keys with the tessera command")
        pepper = self.key_pepper.get_secret_value()
        if pepper == DEVELOPMENT_PEPPER or len(pepper) < _SHORTEST_PEPPER:
            raise ValueError(f"key_pepper must be set to a secret of at least {_SHORTEST_PEPPER} characters in the profile production")
        if not self.oidc.is_encrypted:
            raise ValueError("oidc.issuer and oidc.jwks_url must begin with https:// in the profile production")
        return self

    @property
    def kafka_required(self) -> bool:
        """With a spool the gateway goes on accepting without Kafka."""
        return self.spool.folder is None

    @property
    def model_names(self) -> ModelNames:
        """As the directory of models takes them."""
        return ModelNames(self.model_aliases)

    @property
    def pepper(self) -> bytes:
        """The pepper as the hash takes it."""
        return self.key_pepper.get_secret_value().encode()

    @property
    def key_environment(self) -> str:
        """The environment that new keys name."""
        return {"production": "live", "test": "test"}.get(self.profile, "dev")
