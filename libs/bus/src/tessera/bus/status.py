"""What each replica says about itself, and what operators say to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from tessera.bus.bus import Bus
from tessera.bus.events import Received
from tessera.bus.partitions import PASSING
from tessera.contracts.events import DependencyStatus, ServiceControlled, ServiceStatus
from tessera.telemetry import Health, ReadyReport, get_logger

REPORT_EVERY: Final = timedelta(seconds=2)
PLATFORM: Final = "platform"
"""The tenant of events that belong to no tenant."""

_STATES: Final = {"ready": "ready", "degraded": "degraded", "unavailable": "unready", "starting": "starting", "draining": "stopping"}

_log = get_logger(__name__)


def version_of(service: str) -> str:
    """The installed version of a service's package."""
    try:
        return version(f"tessera-{service}")
    except PackageNotFoundError:
        return "unknown"


class StatusReporter:
    """Publishes `service.status` every two seconds and whenever it is told that something changed."""

    def __init__(self, bus: Bus, health: Health) -> None:
        self._bus = bus
        self._health = health
        self._started_at = datetime.now(UTC)
        self._changed = asyncio.Event()
        self._version = version_of(bus.settings.service)

    def changed(self) -> None:
        """The next report goes out at once."""
        self._changed.set()

    async def run(self) -> None:
        """Reports until cancelled. A report that fails is dropped: the next one says more."""
        while True:
            self._changed.clear()
            with suppress(*PASSING):
                await self.report()
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY.total_seconds()):
                    await self._changed.wait()

    async def report(self, state: str | None = None) -> None:
        """Publishes one report; `state` replaces what health says. Raises RetryableError when Kafka does not answer."""
        settings = self._bus.settings
        status = self._status(await self._health.ready(), state)
        await self._bus.publish(status, tenant_id=PLATFORM, key=f"{settings.service}/{settings.instance}".encode())

    def _status(self, ready: ReadyReport, state: str | None) -> ServiceStatus:
        settings = self._bus.settings
        return ServiceStatus(
            service=settings.service,
            instance=settings.instance,
            state=state or _STATES[ready.status],
            version=self._version,
            started_at=self._started_at,
            reported_at=datetime.now(UTC),
            dependencies=tuple(
                DependencyStatus(
                    name=name,
                    required=report.required,
                    healthy=report.status == "up",
                    breaker=report.breaker or "closed",
                    message=report.error[:500] if report.error else None,
                )
                for name, report in ready.dependencies.items()
            ),
            consumers=tuple(consumer.status() for consumer in self._bus.consumers),
        )


class ControlListener:
    """Obeys `service.control`: pause and resume of consumers, reload of settings."""

    def __init__(self, bus: Bus, reload: Callable[[], None], changed: Callable[[], None]) -> None:
        self._bus = bus
        self._reload = reload
        self._changed = changed
        bus.feed(ServiceControlled, self._obey)

    async def _obey(self, event: Received[ServiceControlled]) -> None:
        command, settings = event.data, self._bus.settings
        if command.service != settings.service or command.instance not in (None, settings.instance):
            return
        _log.info("control received", action=command.action, consumer=command.consumer)
        if command.action == "reload":
            self._reload()
        else:
            self._set_paused(command)
        self._changed()

    def _set_paused(self, command: ServiceControlled) -> None:
        for consumer in self._bus.consumers:
            if command.consumer not in (None, consumer.name):
                continue
            if command.parked is not None:
                consumer.decide(command.parked)
            else:
                consumer.pause() if command.action == "pause" else consumer.resume()
