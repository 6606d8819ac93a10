"""The compacted topics that every gateway replica reads."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tessera.bus import Bus, Received
from tessera.contracts.events import ModelDeclared, ServiceStatus
from tessera.gateway.domain.directories import ModelDirectory, StatusDirectory
from tessera.gateway.handlers import tables


@dataclass(frozen=True)
class NamedTable:
    """A table and a wait for the moment when it knows what was there at the start."""

    name: str
    caught_up: Callable[[], Awaitable[None]]


def register(bus: Bus, models: ModelDirectory, statuses: StatusDirectory) -> list[NamedTable]:
    """Models on offer, and how every replica is."""

    def model_declared(event: Received[ModelDeclared]) -> None:
        tables.model_declared(models, event.data, event.time)

    def service_reported(event: Received[ServiceStatus]) -> None:
        tables.service_reported(statuses, event.data)

    return [
        NamedTable("models", bus.table(ModelDeclared, model_declared).caught_up),
        NamedTable("statuses", bus.table(ServiceStatus, service_reported).caught_up),
    ]
