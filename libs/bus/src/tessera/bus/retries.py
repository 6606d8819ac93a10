"""Retry topics: where an event whose order does not matter waits for its next attempt. `docs/retries.md` has the mechanism."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from tessera.bus.codec import Encoded, Headers, rfc3339
from tessera.bus.events import Position
from tessera.bus.outbox import OutboxRow
from tessera.bus.parked import StoredRecord
from tessera.bus.records import Record
from tessera.contracts.catalogue import RETRY_TOPICS, RetryTopic, catalogued
from tessera.contracts.errors import InvalidError, TesseraError
from tessera.contracts.ids import derived_id

_PREFIX: Final = "tessera_retry_"
_FIRST: Final = _PREFIX + "attempt"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A record of a retry topic: the original one, and since when and until when it waits."""

    record: StoredRecord
    """As it came first: place, headers and bytes."""
    place: Position
    """Where it came first, in the catalogue's spelling."""
    due: datetime


def next_retry(name: str, service: str) -> RetryTopic | None:
    """Where an event read from `name` waits next; None where its order matters, or after the last."""
    before = RETRY_TOPICS[name].attempt if name in RETRY_TOPICS else 0
    return next((retry for retry in catalogued(name).retry_topics(service) if retry.attempt == before + 1), None)


def retry_row(record: Record, place: Position, retry: RetryTopic, error: TesseraError) -> OutboxRow:
    """The record byte for byte, with further headers that say where it came first and when it is due, for a retry topic."""
    reason = {
        "attempt": str(retry.attempt),
        "topic": place.topic,
        "partition": str(place.partition),
        "offset": str(place.offset),
        "due": rfc3339(datetime.now(UTC) + retry.delay),
        "time": str(record.timestamp),
        "code": error.code,
    }
    headers = [(name, value or b"") for name, value in record.headers]
    headers += [(_PREFIX + name, value.encode()) for name, value in reason.items()]
    event_id = derived_id(f"{place.topic}/{place.partition}/{place.offset}", "retry", retry.attempt)
    return OutboxRow(event_id, retry.name, record.key, Encoded(headers, record.value or b""))


def waiting(record: Record, retry: RetryTopic) -> Waiting:
    """What waits in a record of `retry`. Raises InvalidError `retry_unreadable` for what no consumer of ours wrote there."""
    headers, reason = _split(record.headers)
    try:
        place = Position(reason["topic"], int(reason["partition"]), int(reason["offset"]))
        due, timestamp = datetime.fromisoformat(reason["due"]), int(reason["time"])
        is_ours = catalogued(place.topic).name == retry.topic and due.tzinfo is not None and min(place.partition, place.offset) >= 0
    except (KeyError, ValueError):
        is_ours = False
    if not is_ours:
        raise InvalidError("retry_unreadable", "The record does not say where the event came from.")
    return Waiting(StoredRecord(record.topic, place.partition, place.offset, timestamp, record.key, record.value, headers), place, due)


def due_in(record: Record, retry: RetryTopic) -> timedelta:
    """How long a record of a retry topic has to wait yet; never longer than the topic's delay, whatever a clock or a stranger says."""
    with suppress(InvalidError):
        return min(retry.delay, timedelta(seconds=max(0.0, waiting(record, retry).due.timestamp() - time.time())))
    return timedelta(0)


def _split(given: Headers) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """The original headers, and ours: what was added last, whatever a producer called its own headers."""
    headers = [(name, value or b"") for name, value in given]
    starts = [place for place, (name, _) in enumerate(headers) if name == _FIRST]
    start = starts[-1] if starts else len(headers)
    return headers[:start], {name.removeprefix(_PREFIX): value.decode(errors="replace") for name, value in headers[start:]}
