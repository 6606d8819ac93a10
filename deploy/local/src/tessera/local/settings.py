"""What a person may set about the stack of one checkout: environment variables, or `.env` in the checkout."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tessera.local.folders import CHECKOUT

MEBIBYTE = 2**20


class LocalSettings(BaseSettings):
    """Sizes and limits of `make run`. Each is `TESSERA_LOCAL__<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TESSERA_LOCAL__", env_file=CHECKOUT / ".env", extra="ignore")

    gateway_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the gateway; chosen free at the first run and remembered when not set."""
    gateway_processes: int = Field(default=2, ge=1, le=16)
    """Gateway processes that share the port."""
    kafka_heap_megabytes: int = Field(default=512, ge=192)
    kafka_segment_bytes: int = Field(default=16 * MEBIBYTE, ge=MEBIBYTE)
    """Size of one log segment, the unit in which Kafka deletes."""
    kafka_retention_bytes: int = Field(default=64 * MEBIBYTE, ge=MEBIBYTE)
    """Cap per partition, for topics without a cap of their own."""
    log_bytes: int = Field(default=8 * MEBIBYTE, ge=65536)
    """Size at which a process's log is rotated; one older file is kept."""
    trace_bytes: int = Field(default=256 * MEBIBYTE, ge=MEBIBYTE)
    """Cap of all span files together."""
    ready_seconds: int = Field(default=300, ge=1)
    """How long servers and services may take to become ready."""
    tour: bool = True
    """Whether `make run` ends with the tour."""
