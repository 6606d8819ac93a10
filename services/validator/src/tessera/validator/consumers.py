"""From topic to handler."""

from __future__ import annotations

from collections.abc import Callable

from tessera.bus import Bus, Received, Transaction
from tessera.contracts.events import ValidationCancelled, ValidationInspected, ValidationRequested
from tessera.validator import handlers
from tessera.validator.ports import ValidationUnit

UnitOf = Callable[[Transaction], ValidationUnit]


def register(bus: Bus, unit_of: UnitOf) -> None:
    """Registers every handler of the validator."""
    bulk = bus.consumer("bulk")

    @bulk.transactional(ValidationRequested)
    async def validation_requested(event: Received[ValidationRequested], transaction: Transaction) -> None:
        await handlers.validation_requested(event, unit_of(transaction))

    @bulk.transactional(ValidationInspected)
    async def validation_inspected(event: Received[ValidationInspected], transaction: Transaction) -> None:
        await handlers.validation_inspected(event, unit_of(transaction))

    @bulk.transactional(ValidationCancelled)
    async def validation_cancelled(event: Received[ValidationCancelled], transaction: Transaction) -> None:
        await handlers.validation_cancelled(event, unit_of(transaction))
