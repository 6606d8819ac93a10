"""What an operator can set about Postgres, Redis and the object store."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from tessera.storage.tls import TlsFiles

Role = Literal["owner", "worker", "client", "authenticator"]

SERVICES = ("gateway", "tokenizer", "generator", "memory", "retention", "validator")


def role_name(service: str, role: Role) -> str:
    """The Postgres role of a service: owner (migrations), worker, client (row-level security) or, for the gateway, authenticator."""
    return f"tessera_{service}_{role}"


class PostgresTls(TlsFiles):
    """Encryption of the connection, with libpq's meaning of the modes."""

    mode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] = "prefer"
    """Only `verify-full` keeps out somebody in between; `require` with a `ca_file` is `verify-ca`."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.mode in ("disable", "prefer") and self.are_given:
            raise ValueError(f"the files have no effect in mode {self.mode}: set it to verify-full (or require, verify-ca)")
        return self


class PostgresSettings(BaseModel):
    """Address, passwords and pool of a service's Postgres. Times are in seconds."""

    model_config = ConfigDict(extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=5432, ge=1, le=65535)
    database: str = Field(default="tessera", pattern=r"^[a-z_][a-z0-9_]{0,62}$")
    tls: PostgresTls = Field(default_factory=PostgresTls)

    worker_password: SecretStr
    client_password: SecretStr
    owner_password: SecretStr | None = None
    """Needed to bootstrap and to migrate only; keep it away from running services."""
    authenticator_password: SecretStr | None = None
    """The gateway's alone: where it is set, bootstrap makes the role."""

    pool_size: int = Field(default=10, ge=1)
    """Most connections kept open per role in use; one is opened when all others are busy."""
    max_overflow: int = Field(default=0, ge=0)
    """Connections beyond pool_size that are opened under load and closed afterwards. Opening one costs more than ten transactions."""
    pool_timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest wait for a free connection."""
    pre_ping: bool = True
    """Test a pooled connection before it is used, so that a restart of Postgres is not noticed by a handler."""
    pre_ping_idle_seconds: float = Field(default=1.0, ge=0)
    """A connection used more recently is only looked at, not asked: a question costs three round trips. 0 asks always."""
    recycle_seconds: int = Field(default=1800, ge=-1)
    """Age at which a connection is replaced; -1 never."""
    connect_timeout_seconds: float = Field(default=5.0, gt=0)
    statement_timeout_seconds: float = Field(default=15.0, gt=0)
    answer_grace_seconds: float = Field(default=3.0, gt=0)
    """How much longer than the statement's time-out an answer is waited for; then the server counts as gone."""
    idle_in_transaction_timeout_seconds: float = Field(default=30.0, gt=0)
    transaction_timeout_seconds: float = Field(default=30.0, gt=0)
    """Set on the roles by bootstrap; Postgres ends the session of a longer transaction."""
    statement_cache_size: int = Field(default=512, ge=0)
    """Prepared statements kept per connection; 0 behind a pooler that shares sessions between transactions."""
    breaker_failure_threshold: int = Field(default=5, ge=1)
    breaker_reset_seconds: float = Field(default=2.0, gt=0)

    def password(self, role: Role) -> SecretStr:
        """The password of a role. Raises ValueError when it is not set."""
        passwords: Mapping[Role, SecretStr | None] = {
            "owner": self.owner_password,
            "worker": self.worker_password,
            "client": self.client_password,
            "authenticator": self.authenticator_password,
        }
        password = passwords[role]
        if password is None:
            raise ValueError(f"postgres.{role}_password is not set")
        return password


class RedisSettings(BaseModel):
    """Address and patience of the Redis client. Redis holds only what may be lost, so it is never waited for long."""

    model_config = ConfigDict(extra="forbid")

    url: str = "redis://127.0.0.1:6379/0"
    """`redis://` or `rediss://` (TLS). A password in it is moved to `password`, so that the address can be shown."""
    username: str | None = None
    password: SecretStr | None = None
    tls: TlsFiles = Field(default_factory=TlsFiles)
    """For `rediss://`; the server is verified, and its host name too."""
    timeout_seconds: float = Field(default=0.25, gt=0)
    """For each answer; a command takes at most (retries + 1) times as long."""
    connect_timeout_seconds: float = Field(default=0.5, gt=0)
    retries: int = Field(default=1, ge=0)
    max_connections: int = Field(default=64, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _password_apart(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "@" not in str(values.get("url", "")):
            return values
        parts = urlsplit(str(values["url"]))
        found = {"username": unquote(parts.username or "") or None, "password": unquote(parts.password or "") or None}
        return {**found, **values, "url": urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))}

    @field_validator("username", "password", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @property
    def is_encrypted(self) -> bool:
        """Whether the address asks for TLS."""
        return self.url.startswith("rediss://")

    @model_validator(mode="after")
    def _address_and_files_fit(self) -> Self:
        if not self.url.startswith(("redis://", "rediss://")):
            raise ValueError("url must begin with redis:// or, for TLS, rediss://")
        if self.tls.are_given and not self.is_encrypted:
            raise ValueError("tls has no effect on an address that begins with redis://: use rediss://")
        return self


def _objects_folder() -> str:
    return (Path(os.environ.get("TESSERA_HOME", ".tessera")).absolute() / "objects").as_uri()


class ObjectStoreSettings(BaseModel):
    """Where large objects lie: a folder, or anything fsspec knows (`s3://bucket/prefix` with s3fs installed)."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(default_factory=_objects_folder)
    options: dict[str, SecretStr] = Field(default_factory=dict)
    """Passed to the fsspec file system as they are, e.g. key, secret, endpoint_url."""
    breaker_failure_threshold: int = Field(default=5, ge=1)
    breaker_reset_seconds: float = Field(default=5.0, gt=0)


def postgres_settings(service: str, environment: Mapping[str, str] = os.environ) -> PostgresSettings:
    """Reads `TESSERA_<SERVICE>__POSTGRES__…`, each value falling back to `TESSERA__POSTGRES__…`; for commands that run outside a service.

    Raises pydantic's ValidationError naming every wrong or missing value.
    """
    common, own = (_tree(environment, prefix) for prefix in ("TESSERA__POSTGRES__", f"TESSERA_{service.upper()}__POSTGRES__"))
    tls = {**common.pop("tls", {}), **own.pop("tls", {})}
    return PostgresSettings.model_validate({**common, **own, **({"tls": tls} if tls else {})})


def _tree(environment: Mapping[str, str], prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in environment.items():
        if name.upper().startswith(prefix):
            *path, leaf = name[len(prefix) :].lower().split("__")
            branch = tree
            for step in path:
                branch = branch.setdefault(step, {})
            branch[leaf] = value
    return tree
