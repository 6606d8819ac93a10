"""What an operator can set for retention."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tessera.bus.settings import ServiceSettings


class SweepSettings(BaseModel):
    """How sweeps run. Times are in seconds."""

    model_config = ConfigDict(extra="forbid")

    lease_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0
    """After a worker died, another takes its sweep over within this time."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.25
    """Pause when nothing is due, and between looks at items that memory has not answered for."""
    confirmation_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """How long memory may take to answer before a sweep fails as `confirmation_overdue`."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Failing leases in a row before a sweep fails as `sweep_failed`."""

    @property
    def lease(self) -> timedelta:
        """The lease."""
        return timedelta(seconds=self.lease_seconds)


class RetentionSettings(ServiceSettings, service="retention"):
    """Settings of the service retention: `TESSERA_RETENTION__…`."""

    reloadable: ClassVar[frozenset[str]] = ServiceSettings.reloadable | {
        "sweeps.poll_seconds",
        "sweeps.confirmation_seconds",
        "sweeps.attempts",
    }

    sweeps: SweepSettings = Field(default_factory=SweepSettings)
