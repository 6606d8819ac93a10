"""What an operator can set about logs and traces."""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


def home() -> Path:
    """The folder for everything kept at run time: `TESSERA_HOME`, else `.tessera` in the working directory."""
    return Path(os.environ.get("TESSERA_HOME", ".tessera"))


class TelemetrySettings(BaseModel):
    """Where logs and spans go, and how much disk they may take."""

    model_config = ConfigDict(extra="forbid")

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_file: Path | None = None
    """JSON lines go here instead of to standard output."""
    log_file_bytes: int = Field(default=16 * 1024 * 1024, ge=4096)
    """Size at which the log file is rotated; one older file is kept."""
    tracing: bool = True
    sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of new traces that are recorded; a continued trace keeps its caller's decision."""
    otlp_endpoint: str | None = None
    """Full address of an OTLP/HTTP trace receiver, e.g. `http://127.0.0.1:4318/v1/traces`. Without it spans go to files."""
    otlp_headers: dict[str, SecretStr] = Field(default_factory=dict)
    otlp_timeout_seconds: float = Field(default=5.0, gt=0)
    trace_folder: Path = Field(default_factory=lambda: home() / "traces")
    trace_file_bytes: int = Field(default=16 * 1024 * 1024, ge=4096)
    """Size at which a process's span file is rotated; one older file is kept."""
    trace_folder_bytes: int = Field(default=256 * 1024 * 1024, ge=4096)
    """Files of ended processes are removed, oldest first, until the folder is below this size when a process starts."""
    flush_milliseconds: int = Field(default=500, ge=10, le=1000)
    """Longest time a finished span waits before it is exported."""
