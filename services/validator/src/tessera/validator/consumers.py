"""From topic to handler."""

from __future__ import annotations

from tessera.bus import Bus, Received, Transaction
from tessera.contracts.events import ValidationInspected, ValidationRequested
from tessera.validator import handlers
from tessera.validator.adapters.postgres import PostgresUnit


def register(bus: Bus) -> None:
    """Registers every handler of the validator."""
    bulk = bus.consumer("bulk")

    @bulk.transactional(ValidationRequested)
    async def validation_requested(event: Received[ValidationRequested], transaction: Transaction) -> None:
        await handlers.validation_requested(event, PostgresUnit(transaction))

    @bulk.transactional(ValidationInspected)
    async def validation_inspected(event: Received[ValidationInspected], transaction: Transaction) -> None:
        await handlers.validation_inspected(event, PostgresUnit(transaction))
