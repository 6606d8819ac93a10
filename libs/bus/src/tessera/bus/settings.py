"""What an operator can set for a service; every value is checked at start and all that is wrong is said at once."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from pydantic_settings.sources import DotenvFiltering

from tessera.contracts.catalogue import REPLY_PARTITIONS
from tessera.storage import ObjectStoreSettings, PostgresSettings, RedisSettings, TlsFiles
from tessera.telemetry import TelemetrySettings

_COMMON: Final = "TESSERA__"

Profile = Literal["development", "test", "production"]


class KafkaTls(TlsFiles):
    """Encryption of the connection to the brokers."""

    check_hostname: bool = True
    """False where brokers' certificates carry other names than their addresses: then any certificate of the authority is a broker's."""


class HandlerSeconds(BaseModel):
    """How long one call of a handler may take, by traffic class, before it is cut off and counts as a failure without a reason.

    Below the time-out of a statement, so that an event whose statement never ends cannot pass for a lost Postgres.
    """

    model_config = ConfigDict(extra="forbid")

    chat: Annotated[float, Field(gt=0)] = 10.0
    ingestion: Annotated[float, Field(gt=0)] = 10.0
    bulk: Annotated[float, Field(gt=0)] = 12.0

    def of(self, traffic_class: str) -> timedelta:
        """The limit of one class."""
        return timedelta(seconds={"chat": self.chat, "ingestion": self.ingestion}.get(traffic_class, self.bulk))


class RetrySettings(BaseModel):
    """What becomes of events that cannot be handled yet, or ever (docs/retries.md)."""

    model_config = ConfigDict(extra="forbid")

    handler_seconds: HandlerSeconds = Field(default_factory=HandlerSeconds)
    attempts: Annotated[int, Field(ge=1)] = 15
    """Attempts for an event whose key waits for it; then it is stuck until an operator decides."""
    initial_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Pause before the first of them; it doubles with each."""
    maximum_seconds: Annotated[float, Field(gt=0)] = 600.0
    """No pause is longer."""
    parked_events: Annotated[int, Field(ge=1)] = 10_000
    """Most events that wait on one partition; beyond, the partition waits."""
    keep_days: Annotated[float, Field(gt=0)] = 7.0
    """How long it is remembered which events were refused."""
    dead_letters_in_a_row: Annotated[int, Field(ge=1)] = 20
    """So many dead letters one after the other halt the consumer."""
    dead_letters_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The same where this share of the last 1,000 events became dead letters."""


class KafkaSettings(BaseModel):
    """Where Kafka is, and how it is read and written."""

    model_config = ConfigDict(extra="forbid")

    bootstrap_servers: str = "127.0.0.1:9092"
    topic_prefix: Annotated[str, Field(max_length=64, pattern=r"^[a-zA-Z0-9._-]*$")] = ""
    """Before every topic and group: several Tesseras can share a cluster."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """SSL is TLS, and with a client's certificate mutual TLS; SASL_SSL logs in with a user name inside TLS."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    tls: KafkaTls = Field(default_factory=KafkaTls)
    replication_factor: Annotated[int, Field(ge=1)] = 1
    minimum_in_sync_replicas: Annotated[int, Field(ge=1)] = 1
    keyed_partitions: Annotated[int | None, Field(ge=1)] = None
    """Partitions of keyed topics when they are created; the catalogue's number where absent (tests use 4)."""
    shared_ingest: bool = True
    """Whether the shared topic `ingest` is read; a tenant's own topics always are."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 15.0
    metadata_max_age_seconds: Annotated[float, Field(gt=0)] = 5.0
    """A new tenant's ingestion topic is found within this time."""
    session_timeout_seconds: Annotated[float, Field(gt=0)] = 6.0
    """A replica that died is replaced after this time. Brokers allow no less than 6 s unless told otherwise."""
    heartbeat_milliseconds: Annotated[int, Field(ge=50)] = 500
    """Also how fast a member notices a rebalance."""
    rebalance_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A member that takes longer to drain is left behind; must exceed the drain deadline, and be below the platform's grace period."""
    fetch_max_wait_milliseconds: Annotated[int, Field(ge=1)] = 50
    """Longest wait of a fetch that leaves a partition out because it is slow: so long that one waits once it goes on."""
    idle_fetch_wait_milliseconds: Annotated[int, Field(ge=1)] = 1_000
    """The same of a fetch that leaves nothing out. It returns at once when there is something; a short wait only costs processor time."""
    batch_records: Annotated[int, Field(ge=1, le=5_000)] = 200
    """Most events in one transaction."""
    partitions_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    """Transactions of one consumer at the same time; small batches of several partitions share one of them."""
    window: Annotated[int, Field(ge=1, le=1_000)] = 64
    """Most events of one consumer in hand at once where order does not matter."""
    retry: RetrySettings = Field(default_factory=RetrySettings)
    commit_milliseconds: Annotated[int, Field(ge=10)] = 200
    """How often a consumer commits the offset up to which it has handled everything."""

    @field_validator("sasl_username", "sasl_password", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _fits_protocol(self) -> Self:
        credentials = (self.sasl_username, self.sasl_password)
        if self.logs_in and not all(credentials):
            raise ValueError(f"sasl_username and sasl_password are needed with {self.security_protocol}")
        if not self.logs_in and any(credentials):
            raise ValueError(f"sasl_username and sasl_password have no effect with {self.security_protocol}: use SASL_SSL")
        if self.tls.are_given and not self.is_encrypted:
            raise ValueError(f"tls has no effect with {self.security_protocol}: use SSL or SASL_SSL")
        return self

    @property
    def logs_in(self) -> bool:
        """Whether a user name and a password are sent."""
        return self.security_protocol.startswith("SASL")

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS."""
        return self.security_protocol.endswith("SSL")

    def physical(self, topic: str) -> str:
        """The name of a topic or group on the cluster."""
        return self.topic_prefix + topic

    def logical(self, name: str) -> str:
        """The catalogue's name of a topic on the cluster."""
        return name.removeprefix(self.topic_prefix)

    def connection(self, client_id: str) -> dict[str, Any]:
        """What every client of aiokafka needs to connect. Raises ValueError when a TLS file has become unusable since the start."""
        return {
            "bootstrap_servers": self.bootstrap_servers,
            "client_id": client_id,
            "request_timeout_ms": int(self.request_timeout_seconds * 1000),
            "security_protocol": self.security_protocol,
            "ssl_context": self.tls.context(check_hostname=self.tls.check_hostname) if self.is_encrypted else None,
            "sasl_mechanism": self.sasl_mechanism if self.logs_in else "PLAIN",
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": self.sasl_password.get_secret_value() if self.sasl_password else None,
        }


def _instance() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"[:128]


class ServiceSettings(BaseSettings):
    """The part of a service's settings that all services have; a service's own class adds to it.

    `class MemorySettings(ServiceSettings, service="memory")` reads `TESSERA_MEMORY__KAFKA__BOOTSTRAP_SERVERS`, and where that is absent
    the common `TESSERA__KAFKA__BOOTSTRAP_SERVERS`. The same lines in the file `TESSERA_SETTINGS_FILE` come after both, and files named like
    the variables in the folder `TESSERA_SECRETS` (one value per file) after that.
    """

    model_config = SettingsConfigDict(extra="forbid", env_nested_delimiter="__", validate_default=True)
    service: ClassVar[str] = ""
    postgres_required: ClassVar[bool] = True
    """False where the service's documented degraded mode does without its Postgres: then it stays ready."""
    reloadable: ClassVar[frozenset[str]] = frozenset({"telemetry.log_level"})
    """Settings, by their path, that a running service takes up; for any other a restart is needed. A path stands for all below it."""
    serves_without_kafka: ClassVar[bool] = False
    """True where HTTP and workers begin before Kafka answers, because there is something to say without it (the gateway)."""

    profile: Profile = "development"
    instance: Annotated[str, Field(min_length=1, max_length=128)] = Field(default_factory=_instance)
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    postgres: PostgresSettings
    redis: RedisSettings = Field(default_factory=RedisSettings)
    objects: ObjectStoreSettings = Field(default_factory=ObjectStoreSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)
    admin_host: str = "127.0.0.1"
    admin_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """0 takes a free port and logs it."""
    drain_seconds: Annotated[float, Field(gt=0)] = 20.0
    """How long a stop may take to finish what is in hand."""
    termination_grace_seconds: Annotated[float, Field(gt=0)] = 45.0
    """What the platform gives a process between SIGTERM and SIGKILL (terminationGracePeriodSeconds, stop_grace_period)."""
    reply_partitions: tuple[Annotated[int, Field(ge=0, lt=REPLY_PARTITIONS)], ...] = ()
    """Partitions of the reply topic that this process reads; one found from `instance` where none are given (the gateway's)."""
    crash_point: str | None = None
    """Kills the process at a named point (`name:3` at the third time); only in the profile test."""

    def __init_subclass__(cls, *, service: str = "", **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.service = service or cls.service

    @classmethod
    def __pydantic_init_subclass__(cls, *, service: str = "", **keywords: Any) -> None:
        super().__pydantic_init_subclass__(**keywords)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Given values, the service's variables, the common ones, then files."""
        prefixes = (f"TESSERA_{cls.service.upper()}__", _COMMON)
        variables = [_Variables(settings_cls, env_prefix=prefix) for prefix in prefixes]
        lines = [_Lines(settings_cls, file, env_prefix=prefix) for file in settings_file() for prefix in prefixes]
        return (init_settings, *variables, *lines, *_secret_files(settings_cls, file_secret_settings, prefixes))

    @model_validator(mode="after")
    def _fits_profile(self) -> Self:
        if self.crash_point and self.profile != "test":
            raise ValueError("crash_point is only for the profile test")
        if self.profile == "production" and (self.kafka.security_protocol, self.kafka.sasl_mechanism) == ("SASL_PLAINTEXT", "PLAIN"):
            raise ValueError("kafka would get the password in clear: use SASL_SSL, or a SCRAM mechanism")
        if self.drain_seconds >= self.kafka.rebalance_timeout_seconds:
            raise ValueError("drain_seconds must be below kafka.rebalance_timeout_seconds, else a draining replica is left behind")
        if self.kafka.rebalance_timeout_seconds >= self.termination_grace_seconds:
            raise ValueError("kafka.rebalance_timeout_seconds must be below termination_grace_seconds, else a draining replica is killed")
        return self

    @property
    def kafka_required(self) -> bool:
        """Whether the service cannot serve its documented degraded mode without Kafka."""
        return True

    @property
    def drain(self) -> timedelta:
        """The drain deadline."""
        return timedelta(seconds=self.drain_seconds)


def settings_file() -> list[Path]:
    """The file of settings, where one is named. Raises SettingsError for one that cannot be read."""
    named = os.environ.get("TESSERA_SETTINGS_FILE")
    if not named:
        return []
    if not os.access(named, os.R_OK):
        raise SettingsError(f"TESSERA_SETTINGS_FILE names {named}, which cannot be read")
    return [Path(named)]


class _Variables(EnvSettingsSource):
    """Variables of the environment. A value that is no JSON where it should be is told with everything else that is wrong."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """As in the base class, but what cannot be decoded is left for the validation of the field."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class _Lines(_Variables, DotEnvSettingsSource):
    """Lines of a file, which names the settings of other services too. A service's own that does not exist is an error."""

    def __init__(self, settings_cls: type[BaseSettings], file: Path, *, env_prefix: str) -> None:
        filtering: DotenvFiltering = "only_existing" if env_prefix == _COMMON else "match_prefix"
        DotEnvSettingsSource.__init__(self, settings_cls, file, "utf-8", filtering, env_prefix=env_prefix)


def _secret_files(
    settings_cls: type[BaseSettings], fallback: PydanticBaseSettingsSource, prefixes: tuple[str, ...]
) -> list[PydanticBaseSettingsSource]:
    folder = os.environ.get("TESSERA_SECRETS")
    if not folder:
        return []
    return [
        NestedSecretsSettingsSource(
            fallback,
            secrets_dir=folder,
            secrets_dir_missing="error",
            secrets_prefix=prefix,
            secrets_nested_delimiter="__",
            secrets_case_sensitive=False,
        )
        for prefix in prefixes
    ]
