"""The compacted topics that every gateway replica reads."""

from collections.abc import Mapping

from tessera.bus import Bus, Received
from tessera.bus.tables import Table
from tessera.contracts.events import ModelDeclared, ServiceStatus
from tessera.gateway.domain.directories import ModelDirectory, StatusDirectory
from tessera.gateway.handlers import tables


def register(bus: Bus, models: ModelDirectory, statuses: StatusDirectory) -> Mapping[str, Table]:
    """Models on offer, and how every replica is; the tables by the name of their dependency."""

    def model_declared(event: Received[ModelDeclared]) -> None:
        tables.model_declared(models, event.data, event.time)

    def service_reported(event: Received[ServiceStatus]) -> None:
        tables.service_reported(statuses, event.data)

    declared, reported = bus.table(ModelDeclared, model_declared), bus.table(ServiceStatus, service_reported)
    models.is_complete = lambda: declared.is_complete
    statuses.is_complete = lambda: reported.is_complete
    return {"models": declared, "statuses": reported}
