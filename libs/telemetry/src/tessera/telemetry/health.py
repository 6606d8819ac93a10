"""Whether this replica can do its work (ready) and whether it is stuck (live)."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel

from tessera.telemetry import metrics
from tessera.telemetry.redaction import redacted_text

Check = Callable[[], Awaitable[None] | None]
Phase = Literal["starting", "serving", "draining"]

_BREAKER_VALUE = {"closed": 0.0, "half_open": 0.5, "open": 1.0}


class DependencyReport(BaseModel):
    """What the last check of one dependency said."""

    status: Literal["up", "down"]
    required: bool
    breaker: str | None = None
    error: str | None = None
    check_seconds: float


class ReadyReport(BaseModel):
    """`ready` with every dependency up, `degraded` when only optional ones are down; both can serve."""

    status: Literal["ready", "degraded", "unavailable", "starting", "draining"]
    service: str
    instance: str
    dependencies: dict[str, DependencyReport]

    @property
    def ready(self) -> bool:
        """True when the replica can serve, be it in its documented degraded mode."""
        return self.status in ("ready", "degraded")


class LiveReport(BaseModel):
    """`failed` names each check that says the process is stuck and must be restarted."""

    status: Literal["live", "stuck"]
    failed: dict[str, str]

    @property
    def live(self) -> bool:
        """True when no check found a stuck loop."""
        return self.status == "live"


@dataclass(frozen=True)
class _Dependency:
    name: str
    required: bool
    check: Check
    breaker_state: Callable[[], str] | None

    async def report(self, limit: timedelta) -> DependencyReport:
        started = time.monotonic()
        error = await _outcome(self.check, limit)
        breaker = self.breaker_state() if self.breaker_state else None
        if error is None and breaker == "open":
            error = "its circuit breaker is open"
        self._measure(error is None, breaker)
        return DependencyReport(
            status="up" if error is None else "down",
            required=self.required,
            breaker=breaker,
            error=error,
            check_seconds=round(time.monotonic() - started, 4),
        )

    def _measure(self, up: bool, breaker: str | None) -> None:
        metrics.DEPENDENCY_UP.labels(dependency=self.name).set(up)
        if breaker is not None:
            metrics.BREAKER_OPEN.labels(dependency=self.name).set(_BREAKER_VALUE[breaker])


class Health:
    """Collects the checks of one replica. Use from its event loop only.

    The phase begins as `starting`; whoever runs the service sets `serving` and `draining`. Ready reports are kept for `fresh_for`, so a
    burst of probes costs the dependencies one check.
    """

    def __init__(
        self,
        service: str = "",
        instance: str = "",
        *,
        check_timeout: timedelta = timedelta(seconds=2),
        fresh_for: timedelta = timedelta(seconds=1),
    ) -> None:
        self.service, self.instance = service, instance
        self.phase: Phase = "starting"
        self._check_timeout, self._fresh_for = check_timeout, fresh_for
        self._dependencies: dict[str, _Dependency] = {}
        self._liveness: dict[str, Check] = {}
        self._checked_at = float("-inf")
        self._checked: dict[str, DependencyReport] = {}
        self._checking = asyncio.Lock()

    def add_dependency(self, name: str, *, required: bool, check: Check, breaker_state: Callable[[], str] | None = None) -> None:
        """Adds a dependency. `check` returns when it is usable and raises when not; `breaker_state` gives closed, open or half_open.

        A required dependency that is down makes the replica unavailable, an optional one degraded. Raises ValueError on a name used twice.
        """
        if name in self._dependencies:
            raise ValueError(f"the dependency {name!r} was added before")
        self._dependencies[name] = _Dependency(name, required, check, breaker_state)
        self._checked_at = float("-inf")

    def add_liveness(self, name: str, check: Check) -> None:
        """Adds a check that raises when a loop no longer turns. Raises ValueError on a name used twice."""
        if name in self._liveness:
            raise ValueError(f"the liveness check {name!r} was added before")
        self._liveness[name] = check

    async def ready(self) -> ReadyReport:
        """Checks every dependency at once, each within the check time-out. Never raises."""
        dependencies = await self._dependency_reports()
        return ReadyReport(status=self._status(dependencies), service=self.service, instance=self.instance, dependencies=dependencies)

    async def useful(self) -> bool:
        """Whether it could serve if it did: everything required can be used. Never raises; what cannot be used yet is asked again."""
        reports = await self._dependency_reports()
        lacks = any(report.required and report.status == "down" for report in reports.values())
        if lacks:
            self._checked_at = float("-inf")
        return not lacks

    async def live(self) -> LiveReport:
        """Runs the liveness checks, each within the check time-out. Never raises."""
        checks = dict(self._liveness)  # more may be added while these run
        outcomes = await asyncio.gather(*(_outcome(check, self._check_timeout) for check in checks.values()))
        failed = {name: error for name, error in zip(checks, outcomes, strict=True) if error is not None}
        return LiveReport(status="stuck" if failed else "live", failed=failed)

    async def _dependency_reports(self) -> dict[str, DependencyReport]:
        async with self._checking:
            if time.monotonic() - self._checked_at >= self._fresh_for.total_seconds():
                dependencies = dict(self._dependencies)
                reports = await asyncio.gather(*(dependency.report(self._check_timeout) for dependency in dependencies.values()))
                self._checked = dict(zip(dependencies, reports, strict=True))
                self._checked_at = time.monotonic()
            return self._checked

    def _status(self, dependencies: dict[str, DependencyReport]) -> Literal["ready", "degraded", "unavailable", "starting", "draining"]:
        if self.phase != "serving":
            return self.phase
        down = [report for report in dependencies.values() if report.status == "down"]
        if any(report.required for report in down):
            return "unavailable"
        return "degraded" if down else "ready"


async def _outcome(check: Check, limit: timedelta) -> str | None:
    """None when the check passed, else one line for a person."""
    try:
        async with asyncio.timeout(limit.total_seconds()):
            result = check()
            if inspect.isawaitable(result):
                await result
    except TimeoutError:
        return f"no answer within {limit.total_seconds():g} s"
    # A health report is the place where any failure of a check is told, whatever its type.
    except Exception as error:  # noqa: BLE001
        return redacted_text(f"{type(error).__name__}: {error}")[:300]
    return None
