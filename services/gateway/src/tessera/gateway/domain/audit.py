"""What is put on record: who acts, and which acts there are (docs/audit.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, Literal

from tessera.contracts.events import AuditAction, AuditActor, AuditDetail, AuditOutcome, AuditRecorded, AuditTarget

ACTIONS_OF: Final[Mapping[tuple[str, str], tuple[AuditAction, ...]]] = MappingProxyType(
    {
        ("POST", "/v1/tenants"): ("tenant.create",),
        ("POST", "/v1/keys"): ("key.create",),
        ("POST", "/v1/keys/{key_id}/rotate"): ("key.rotate",),
        ("DELETE", "/v1/keys/{key_id}"): ("key.revoke",),
        ("POST", "/v1/services/{service}/control"): (
            "consumer.pause",
            "consumer.resume",
            "service.reload",
            "parked_event.retry",
            "parked_event.discard",
        ),
        ("POST", "/v1/dead-letters/replay"): ("dead_letter.replay",),
        ("POST", "/v1/dead-letters/discard"): ("dead_letter.discard",),
        ("POST", "/v1/spool/replay"): ("spool.replay",),
        ("PUT", "/v1/retention/policy"): ("policy.set",),
        ("POST", "/v1/retention/sweeps"): ("sweep.start",),
        ("POST", "/v1/retention/sweeps/{sweep_id}/cancel"): ("sweep.cancel",),
    }
)
"""What an operation puts on record. One that changes something by the scope `admin` or `retention` and is not here fails a test."""


@dataclass(frozen=True)
class Actor:
    """Who acts, as far as that is known."""

    kind: Literal["key", "bootstrap", "operator_key", "unknown"]
    """`unknown` also where a key is named and its secret not known."""
    id: str | None = None
    tenant_id: str | None = None
    """Whose key it is."""
    client_address: str | None = None
    request_id: str | None = None


BOOTSTRAP: Final = Actor("bootstrap")
OPERATOR_KEY: Final = Actor("operator_key")


def record(
    by: Actor,
    action: AuditAction,
    *,
    tenant_id: str | None = None,
    target: AuditTarget | None = None,
    details: Mapping[str, str | None] | None = None,
    outcome: AuditOutcome = "succeeded",
    code: str | None = None,
) -> AuditRecorded:
    """An act on record, as done now. Details without a value are left out."""
    return AuditRecorded(
        action=action,
        outcome=outcome,
        actor=AuditActor(kind=by.kind, id=by.id, tenant=by.tenant_id),
        tenant=tenant_id,
        target=target,
        code=code,
        details=tuple(AuditDetail(name=name, value=value) for name, value in (details or {}).items() if value is not None),
        client_address=by.client_address and by.client_address[:64],
        request_id=by.request_id,
        occurred_at=datetime.now(UTC),
    )


def became(known: AuditRecorded, outcome: AuditOutcome, code: str | None = None) -> AuditRecorded:
    """The same act with what came of it, now."""
    return known.model_copy(update={"outcome": outcome, "code": code, "occurred_at": datetime.now(UTC)})
