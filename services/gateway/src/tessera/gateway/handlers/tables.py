"""One function per event of the compacted topics."""

from datetime import datetime

from tessera.contracts.events import ModelDeclared, ServiceStatus
from tessera.gateway.domain.directories import ModelDirectory, StatusDirectory


def model_declared(models: ModelDirectory, declaration: ModelDeclared, declared_at: datetime) -> None:
    """A model is offered, or no longer."""
    models.declare(declaration, declared_at)


def service_reported(statuses: StatusDirectory, status: ServiceStatus) -> None:
    """A replica says how it is."""
    statuses.report(status)
