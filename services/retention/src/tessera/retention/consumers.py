"""From topic to handler."""

from __future__ import annotations

from collections.abc import Callable

from tessera.bus import Bus, Emitter, Received, Transaction
from tessera.contracts.events import (
    AuditInspected,
    AuditRecorded,
    MemoryChanged,
    MemoryRecorded,
    PolicyInspected,
    PolicySubmitted,
    SweepCancelled,
    SweepInspected,
    SweepRequested,
)
from tessera.retention import handlers
from tessera.retention.ports import AuditTrail, RetentionUnit

UnitOf = Callable[[Transaction], RetentionUnit]


def register(bus: Bus, unit_of: UnitOf, trail: AuditTrail) -> None:
    """Registers every handler of retention."""
    _register_ingestion(bus, unit_of)
    _register_policies(bus, unit_of)
    _register_sweeps(bus, unit_of)
    _register_audit(bus, unit_of, trail)


def _register_ingestion(bus: Bus, unit_of: UnitOf) -> None:
    ingestion = bus.consumer("ingestion")

    @ingestion.transactional(MemoryRecorded)
    async def memory_recorded(event: Received[MemoryRecorded], transaction: Transaction) -> None:
        await handlers.memory_recorded(event, unit_of(transaction))

    @ingestion.transactional(MemoryChanged)
    async def memory_changed(event: Received[MemoryChanged], transaction: Transaction) -> None:
        await handlers.memory_changed(event, unit_of(transaction))


def _register_policies(bus: Bus, unit_of: UnitOf) -> None:
    chat = bus.consumer("chat")

    @chat.transactional(PolicySubmitted)
    async def policy_submitted(event: Received[PolicySubmitted], transaction: Transaction) -> None:
        await handlers.policy_submitted(event, unit_of(transaction))

    @chat.transactional(PolicyInspected)
    async def policy_inspected(event: Received[PolicyInspected], transaction: Transaction) -> None:
        await handlers.policy_inspected(event, unit_of(transaction))


def _register_sweeps(bus: Bus, unit_of: UnitOf) -> None:
    bulk = bus.consumer("bulk")

    @bulk.transactional(SweepRequested)
    async def sweep_requested(event: Received[SweepRequested], transaction: Transaction) -> None:
        await handlers.sweep_requested(event, unit_of(transaction))

    @bulk.transactional(SweepInspected)
    async def sweep_inspected(event: Received[SweepInspected], transaction: Transaction) -> None:
        await handlers.sweep_inspected(event, unit_of(transaction))

    @bulk.transactional(SweepCancelled)
    async def sweep_cancelled(event: Received[SweepCancelled], transaction: Transaction) -> None:
        await handlers.sweep_cancelled(event, unit_of(transaction))


def _register_audit(bus: Bus, unit_of: UnitOf, trail: AuditTrail) -> None:
    @bus.consumer("bulk").transactional(AuditRecorded)
    async def audit_recorded(event: Received[AuditRecorded], transaction: Transaction) -> None:
        await handlers.audit_recorded(event, unit_of(transaction))

    @bus.consumer("chat").replying(AuditInspected)
    async def audit_inspected(event: Received[AuditInspected], emit: Emitter) -> None:
        await handlers.audit_inspected(event, trail, emit)
