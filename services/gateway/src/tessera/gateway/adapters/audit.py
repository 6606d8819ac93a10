"""The audit trail, by the outbox: on record once the transaction has committed, in the log as soon as the relay gets there."""

from tessera.bus import Bus, Origin, Transaction
from tessera.bus.status import PLATFORM
from tessera.contracts import aggregate_key, uuid7
from tessera.contracts.events import AuditRecorded


class OutboxAuditTrail:
    """Implements `ports.AuditTrail`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def write(self, *acts: AuditRecorded) -> None:
        """One transaction."""
        if acts:
            async with self._bus.transaction(origin_of(acts[0].tenant, acts[0].request_id)) as transaction:
                for index, act in enumerate(acts):
                    await put(transaction, act, index=index)


def origin_of(tenant_id: str | None, request_id: str | None) -> Origin:
    """What the records of one transaction derive from: every call is an act of its own."""
    return Origin(tenant_id or PLATFORM, str(uuid7()), request_id=request_id)


async def put(transaction: Transaction, act: AuditRecorded, *, index: int = 0) -> None:
    """Has the act on record when the transaction commits, and not otherwise."""
    tenant_id = act.tenant or PLATFORM
    await transaction.publish(act, step="audit", index=index, tenant_id=tenant_id, key=aggregate_key(tenant_id, "audit", ""))
