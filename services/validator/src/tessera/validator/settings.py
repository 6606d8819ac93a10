"""What an operator can set for the validator."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tessera.bus.settings import ServiceSettings


class ValidationSettings(BaseModel):
    """How validations run. Times are in seconds."""

    model_config = ConfigDict(extra="forbid")

    lease_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0
    """After a worker died, another takes its validation over within this time."""
    prolong_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How often a lease is prolonged; must be below half of it."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.25
    """Pause when nothing is due."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Leases that come to nothing before a validation fails as `validation_broke`."""
    tenant_concurrency: Annotated[int, Field(ge=1, le=1_000)] = 2
    """Most validations of one tenant that run at once, over all replicas."""
    memory_megabytes: Annotated[int, Field(ge=64)] = 512
    """What DuckDB may hold in memory before it spills."""
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    maximum_bytes: Annotated[int, Field(ge=1)] = 2 << 30
    """Of one dataset; larger ones fail as `dataset_too_large`."""
    maximum_columns: Annotated[int, Field(ge=1, le=5_000)] = 200
    sampled_rows: Annotated[int, Field(ge=100, le=1_000_000)] = 20_000
    """Rows that evidence is computed from; repeats and copies are counted over all rows."""

    @property
    def lease(self) -> timedelta:
        """The lease."""
        return timedelta(seconds=self.lease_seconds)

    @model_validator(mode="after")
    def _prolongs_in_time(self) -> Self:
        if self.prolong_seconds * 2 > self.lease_seconds:
            raise ValueError("prolong_seconds must be at most half of lease_seconds")
        return self


def _scratch_folder() -> Path:
    home = os.environ.get("TESSERA_HOME")
    return Path(home) / "validator" if home else Path(tempfile.gettempdir()) / f"tessera-validator-{os.getuid()}"


class ValidatorSettings(ServiceSettings, service="validator"):
    """Settings of the service validator: `TESSERA_VALIDATOR__…`."""

    reloadable: ClassVar[frozenset[str]] = ServiceSettings.reloadable | {"validations"}

    validations: ValidationSettings = Field(default_factory=ValidationSettings)
    scratch_folder: Path = Field(default_factory=_scratch_folder)
    """Where datasets lie while they are read: on a disk with room for two datasets and what DuckDB spills, shared by replicas
    or not. `validator` in TESSERA_HOME where that is set, else in the system's temporary folder. What a killed process left
    is deleted when another starts."""
