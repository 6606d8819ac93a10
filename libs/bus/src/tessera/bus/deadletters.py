"""What becomes of an event that can never be handled: kept for operators, and told to its producer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from tessera.bus.codec import INGESTION, Encoded, Envelope, attributes_of, encode, is_tenant_id, rfc3339
from tessera.bus.outbox import OutboxRow
from tessera.bus.records import Record
from tessera.bus.transaction import source_of
from tessera.contracts.catalogue import catalogued, dead_letter_topic, refusal_topic, tenant_of_topic
from tessera.contracts.errors import InvalidError, Problem
from tessera.contracts.events import EventRefused
from tessera.contracts.ids import derived_id

CONSUMER_CRASHED: Final = "consumer_crashed"
HANDLER_FAILED: Final = "handler_failed"
_PREFIX: Final = "tessera_dead_letter_"
_UNKNOWN_TENANT_CODES: Final = frozenset({"tenant_missing", "tenant_invalid", "tenant_unknown", "unknown_tenant"})
_NOBODY: Final = "unknown"


def dead_letter(record: Record, topic: str, service: str, error: InvalidError, attempts: int) -> OutboxRow:
    """The record as it came, byte for byte, with the reason in further headers, for `<topic>.<service>.dlq`."""
    reason = {
        "code": error.code,
        "message": error.message[:2_000],
        "field": error.field,
        "error": type(error).__name__,
        "attempts": str(attempts),
        "topic": topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
        "time": rfc3339(datetime.now(UTC)),
    }
    headers = [(name, value or b"") for name, value in record.headers]
    headers += [(_PREFIX + name, value.encode()) for name, value in reason.items() if value is not None]
    return OutboxRow(
        _id_of(record, topic, "dead letter"), dead_letter_topic(topic, service), record.key, Encoded(headers, record.value or b"")
    )


def is_refusable(topic: str) -> bool:
    """Whether the producers of `topic` are told about refusals."""
    return catalogued(topic).name == INGESTION


def refused(record: Record, topic: str, error: InvalidError) -> EventRefused:
    """What is told about a refused event."""
    attributes = attributes_of(record.headers)
    return EventRefused(
        refused_id=attributes.get("id", "")[:512],
        refused_source=attributes.get("source", "")[:2_048],
        refused_type=attributes.get("type", "")[:256],
        reason=Problem.of(error),
        topic=topic,
        partition=record.partition,
        offset=record.offset,
    )


def refusal(record: Record, topic: str, service: str, error: InvalidError) -> OutboxRow:
    """The event that tells the producer; on the shared topic of refusals where the tenant is not known."""
    attributes = attributes_of(record.headers)
    tenant_id = told_tenant(record, topic, error)
    event_id = _id_of(record, topic, "refusal")
    data = refused(record, topic, error)
    envelope = Envelope(
        id=str(event_id), source=source_of(service), tenant_id=tenant_id or _NOBODY, request_id=_clean(attributes.get("requestid"))
    )
    return OutboxRow(event_id, refusal_topic(tenant_id), data.refused_id.encode() or None, encode(data, envelope))


def told_tenant(record: Record, topic: str, error: InvalidError) -> str | None:
    """The tenant that a refusal belongs to; None where there is none, or none that can be believed."""
    owner, claimed = tenant_of_topic(topic), attributes_of(record.headers).get("tenantid")
    if owner is not None:
        return owner
    if error.code in _UNKNOWN_TENANT_CODES or claimed is None or not is_tenant_id(claimed):
        return None
    return claimed


def _clean(value: str | None) -> str | None:
    return value[:128] if value else None


def _id_of(record: Record, topic: str, step: str) -> UUID:
    """From the position, not from the event's own id: a refused event may have none, or somebody else's."""
    return derived_id(f"{topic}/{record.partition}/{record.offset}", step)
