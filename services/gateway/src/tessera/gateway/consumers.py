"""From topics to handlers: the compacted ones that every replica reads, and what becomes of generations."""

from collections.abc import Callable, Mapping, Sequence

from tessera.bus import BatchTransaction, Bus, Received
from tessera.bus.tables import Table
from tessera.contracts.events import GenerationEnded, GenerationRequested, ModelDeclared, ServiceStatus
from tessera.gateway.domain.directories import ModelDirectory, StatusDirectory
from tessera.gateway.domain.records import Prices
from tessera.gateway.handlers import records, tables
from tessera.gateway.ports import RecordsBeingWritten

RecordsOf = Callable[[BatchTransaction], RecordsBeingWritten]


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


def register_records(bus: Bus, records_of: RecordsOf, prices: Prices) -> None:
    """What becomes of generations."""
    chat = bus.consumer("chat")

    @chat.transactional_batch(GenerationRequested)
    async def generations_requested(events: Sequence[Received[GenerationRequested]], transaction: BatchTransaction) -> None:
        await records.generations_requested(events, records_of(transaction))

    @chat.transactional_batch(GenerationEnded)
    async def generations_ended(events: Sequence[Received[GenerationEnded]], transaction: BatchTransaction) -> None:
        await records.generations_ended(events, records_of(transaction), prices)
