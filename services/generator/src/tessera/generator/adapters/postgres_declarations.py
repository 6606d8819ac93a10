"""Which models were declared, so that one that is no longer configured is withdrawn."""

from __future__ import annotations

import asyncio
from typing import Final

from sqlalchemy import text

from tessera.bus import Bus, Origin
from tessera.contracts import ModelDeclared
from tessera.contracts.ids import uuid7
from tessera.generator.domain.models import ModelCatalogue
from tessera.telemetry import get_logger

PLATFORM: Final = "platform"
"""The tenant of what belongs to no tenant."""

_KNOWN = text("SELECT declaration FROM declared_model WHERE tenant_id = :tenant_id FOR UPDATE")
_FORGET = text("DELETE FROM declared_model WHERE tenant_id = :tenant_id AND NOT model_id = ANY(CAST(:model_ids AS text[]))")
_REMEMBER = text(
    "INSERT INTO declared_model (tenant_id, model_id, declaration) VALUES (:tenant_id, :model_id, :declaration) "
    "ON CONFLICT (tenant_id, model_id) DO UPDATE SET declaration = excluded.declaration"
)

_log = get_logger(__name__)


class ModelDeclarations:
    """Declares the catalogue on `model.declared`, through the outbox."""

    def __init__(self, bus: Bus, models: ModelCatalogue) -> None:
        self._bus = bus
        self._models = models

    async def run(self, stopping: asyncio.Event) -> None:
        """Declares once, then waits to be stopped. Raises RetryableError, for whoever restarts it."""
        await self.declare()
        await stopping.wait()

    async def declare(self) -> None:
        """Declares every model of the catalogue and withdraws those that were declared before and are gone, in one transaction."""
        offered = {model.reference.model_id: model.declaration() for model in self._models.models}
        origin = Origin(tenant_id=PLATFORM, parent_id=str(uuid7()))
        async with self._bus.transaction(origin) as transaction:
            rows = await transaction.connection.execute(_KNOWN, {"tenant_id": PLATFORM})
            known = [ModelDeclared.model_validate_json(row.declaration, extra="ignore") for row in rows]
            gone = [model.model_copy(update={"available": False}) for model in known if model.model.model_id not in offered]
            await transaction.connection.execute(_FORGET, {"tenant_id": PLATFORM, "model_ids": list(offered)})
            for index, declaration in enumerate((*offered.values(), *gone)):
                await transaction.publish(declaration, step="model.declared", index=index, key=declaration.model.model_id.encode())
            for declaration in offered.values():
                values = {"model_id": declaration.model.model_id, "declaration": declaration.model_dump_json()}
                await transaction.connection.execute(_REMEMBER, {"tenant_id": PLATFORM, **values})
        _log.info("models_declared", models=list(offered), withdrawn=[model.model.model_id for model in gone])
