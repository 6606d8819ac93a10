"""What becomes of an event that can never be handled: kept for operators, and told to its producer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from types import MappingProxyType
from typing import Final
from uuid import UUID

from tessera.bus.codec import INGESTION, Encoded, Envelope, Headers, attributes_of, encode, is_tenant_id, rfc3339
from tessera.bus.events import Position
from tessera.bus.outbox import OutboxRow
from tessera.bus.records import Record
from tessera.bus.transaction import source_of
from tessera.contracts.catalogue import TOPICS, Mode, catalogued, dead_letter_topic, refusal_topic, tenant_of_topic
from tessera.contracts.errors import InvalidError, Problem
from tessera.contracts.events import EventRefused
from tessera.contracts.ids import derived_id

CONSUMER_CRASHED: Final = "consumer_crashed"
HANDLER_FAILED: Final = "handler_failed"
RETRIES_EXHAUSTED: Final = "retries_exhausted"
DISCARDED: Final = "parked_discarded"
GIVEN_UP: Final = frozenset({CONSUMER_CRASHED, HANDLER_FAILED, RETRIES_EXHAUSTED, DISCARDED})
"""Why an event is a dead letter that might have been handled; every other reason is about the event itself."""
UNREADABLE: Final = "dead_letter_unreadable"
REPLAY_ATTEMPT: Final = "tessera_replay_attempt"
"""How often an operator has replayed the event."""
_PREFIX: Final = "tessera_dead_letter_"
_FIRST_OF_REASON: Final = _PREFIX + "code"
_LONGEST_SHOWN: Final = 2_048
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


@dataclass(frozen=True, slots=True)
class DeadLetterSummary:
    """A dead letter without its bytes. Attributes are as the event claims them, cut after 2,048 characters."""

    place: Position
    """Where the letter itself is; `topic` is `<topic>.<service>.dlq`."""
    digest: bytes
    """16 bytes: the original and where it came from. The same for every copy of a letter."""
    service: str
    """Whose consumer refused it."""
    origin: Position | None
    """Where the event was; None where the record does not say so, and cannot be replayed."""
    code: str
    message: str
    field: str | None
    error: str | None
    attempts: int
    replays: int
    """How often it had been replayed before."""
    refused_at: datetime
    attributes: Mapping[str, str]
    """CloudEvents attributes without their prefix."""
    size_bytes: int
    """Of the original value."""

    @property
    def id(self) -> str:
        """Names the letter: `<topic>:<partition>:<offset>`."""
        return f"{self.place.topic}:{self.place.partition}:{self.place.offset}"

    @property
    def tenant_id(self) -> str | None:
        """The owner of the topic, else whoever the event claims to be of."""
        owner = tenant_of_topic(self.origin.topic) if self.origin else None
        return owner or self.attributes.get("tenantid")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter with the original record."""

    summary: DeadLetterSummary
    key: bytes | None
    headers: Headers
    """Without the reason."""
    value: bytes

    def again(self) -> Encoded:
        """The original, for its own topic: only the header that counts replays is new."""
        kept = [(name, value) for name, value in self.headers if name != REPLAY_ATTEMPT]
        return Encoded([*kept, (REPLAY_ATTEMPT, str(self.summary.replays + 1).encode())], self.value)


@cache
def dead_letter_topics() -> Mapping[str, tuple[str, str]]:
    """Every dead-letter topic of the catalogue, with the topic and the service whose letters it holds."""
    found = {
        dead_letter_topic(topic.name, consumer.service): (topic.name, consumer.service)
        for topic in TOPICS.values()
        for consumer in topic.consumers
        if consumer.mode is not Mode.BROADCAST
    }
    return MappingProxyType(found)


def as_dead_letter(record: Record, name: str) -> DeadLetter:
    """The letter in a record of the dead-letter topic `name` (without an operator's prefix). Never raises: a record that nobody's
    `dead_letter` made is a letter with the code `dead_letter_unreadable`.
    """
    headers, reason = _split(record.headers)
    topic, service = dead_letter_topics()[name]
    origin = _origin(reason, topic)
    value = record.value or b""
    summary = DeadLetterSummary(
        place=Position(name, record.partition, record.offset),
        digest=_digest(origin, record.key, headers, value),
        service=service,
        origin=origin,
        code=reason.get("code", UNREADABLE) if origin else UNREADABLE,
        message=reason.get("message", ""),
        field=reason.get("field"),
        error=reason.get("error"),
        attempts=_whole(reason.get("attempts")),
        replays=_whole(next((value.decode(errors="replace") for name, value in headers if name == REPLAY_ATTEMPT), None)),
        refused_at=_moment(reason.get("time"), record.timestamp),
        attributes={name: value[:_LONGEST_SHOWN] for name, value in attributes_of(headers).items()},
        size_bytes=len(value),
    )
    return DeadLetter(summary, record.key, headers, value)


def _split(given: Headers) -> tuple[Headers, dict[str, str]]:
    """The original headers and the reason. The reason is what was added last, whatever a producer called its own headers."""
    headers = [(name, value or b"") for name, value in given]
    starts = [place for place, (name, _) in enumerate(headers) if name == _FIRST_OF_REASON]
    start = starts[-1] if starts else len(headers)
    reason = {name.removeprefix(_PREFIX): value.decode(errors="replace")[:_LONGEST_SHOWN] for name, value in headers[start:]}
    return headers[:start], reason


def _origin(reason: Mapping[str, str], topic: str) -> Position | None:
    """Where the event was, if that is a topic whose letters may lie here: a forged letter must not write anywhere else."""
    name = reason.get("topic", "")
    with suppress(KeyError, ValueError):
        if catalogued(name).name == topic:
            place = Position(name, int(reason["partition"]), int(reason["offset"]))
            return place if min(place.partition, place.offset) >= 0 else None
    return None


def _digest(origin: Position | None, key: bytes | None, headers: Headers, value: bytes) -> bytes:
    """Each part with its length, so that nothing can pass for something else."""
    digest = hashlib.sha256()
    for part in (repr(origin).encode(), repr(key).encode(), repr(headers).encode(), value):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()[:16]


def _whole(value: str | None) -> int:
    return int(value) if value and value.isascii() and value.isdigit() and len(value) <= 9 else 0


def _moment(value: str | None, milliseconds: int) -> datetime:
    """The time of the reason, else the record's."""
    with suppress(ValueError, TypeError):
        moment = datetime.fromisoformat(value or "")
        if moment.tzinfo is not None:
            return moment
    with suppress(ValueError, OverflowError):
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    return datetime.fromtimestamp(0, UTC)


def is_refusable(topic: str) -> bool:
    """Whether the producers of `topic` are told about refusals."""
    return catalogued(topic).name == INGESTION


def counts_as_ours(topic: str, error: InvalidError) -> bool:
    """Whether a dead letter may be a sign that this service is at fault. What a producer outside sent wrong is not (decision 0009)."""
    return error.code in GIVEN_UP - {DISCARDED} or (error.code not in GIVEN_UP and not is_refusable(topic))


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
