"""From topic to handler."""

from __future__ import annotations

from tessera.bus import Bus, Received, Transaction
from tessera.contracts.events import (
    MemoryChanged,
    MemoryRecorded,
    PolicyInspected,
    PolicySubmitted,
    SweepInspected,
    SweepRequested,
)
from tessera.retention import handlers
from tessera.retention.adapters.postgres import PostgresUnit


def register(bus: Bus) -> None:
    """Registers every handler of retention."""
    _register_ingestion(bus)
    _register_policies(bus)
    _register_sweeps(bus)


def _register_ingestion(bus: Bus) -> None:
    ingestion = bus.consumer("ingestion")

    @ingestion.transactional(MemoryRecorded)
    async def memory_recorded(event: Received[MemoryRecorded], transaction: Transaction) -> None:
        await handlers.memory_recorded(event, PostgresUnit(transaction))

    @ingestion.transactional(MemoryChanged)
    async def memory_changed(event: Received[MemoryChanged], transaction: Transaction) -> None:
        await handlers.memory_changed(event, PostgresUnit(transaction))


def _register_policies(bus: Bus) -> None:
    chat = bus.consumer("chat")

    @chat.transactional(PolicySubmitted)
    async def policy_submitted(event: Received[PolicySubmitted], transaction: Transaction) -> None:
        await handlers.policy_submitted(event, PostgresUnit(transaction))

    @chat.transactional(PolicyInspected)
    async def policy_inspected(event: Received[PolicyInspected], transaction: Transaction) -> None:
        await handlers.policy_inspected(event, PostgresUnit(transaction))


def _register_sweeps(bus: Bus) -> None:
    bulk = bus.consumer("bulk")

    @bulk.transactional(SweepRequested)
    async def sweep_requested(event: Received[SweepRequested], transaction: Transaction) -> None:
        await handlers.sweep_requested(event, PostgresUnit(transaction))

    @bulk.transactional(SweepInspected)
    async def sweep_inspected(event: Received[SweepInspected], transaction: Transaction) -> None:
        await handlers.sweep_inspected(event, PostgresUnit(transaction))
