"""CloudEvents 1.0 in Kafka's binary mode: attributes as `ce_*` headers, the value is the JSON of the data.

Source: CloudEvents Kafka Protocol Binding 1.0.2 §3.2, JSON event format. This is the one step at which content will be sealed and
opened; for now it is the identity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from tessera.bus.events import Received
from tessera.bus.records import Record
from tessera.contracts.base import MAXIMUM_EVENT_BYTES, EventData
from tessera.contracts.catalogue import Topic, tenant_of_topic
from tessera.contracts.errors import InvalidError
from tessera.contracts.ids import identity_digest
from tessera.contracts.upcasting import UPCASTERS
from tessera.contracts.values import value_class

Headers = Sequence[tuple[str, bytes]]
D = TypeVar("D", bound=EventData)

SPECIFICATION_VERSION: Final = "1.0"
CONTENT_TYPE: Final = "application/json"
_SPECIFICATION: Final = SPECIFICATION_VERSION.encode()
_JSON: Final = CONTENT_TYPE.encode()
_PREFIX: Final = "ce_"
_MAXIMUM_ATTRIBUTE_BYTES: Final = 2_048
_SURELY_SHORT: Final = _MAXIMUM_ATTRIBUTE_BYTES // 4
"""Characters that cannot have more bytes than are allowed."""
_MAXIMUM_FRAMED_BYTES: Final = MAXIMUM_EVENT_BYTES + 64 * 1024
INGESTION: Final = "ingest"
_NOTHING: Final = object()
_CONTENT_TYPE: Final = "content-type"
_REMEMBERED: Final = 1_024
"""Names and types of headers whose reading is remembered: a handful in honest traffic, bounded in any other."""


@value_class
class Envelope:
    """The attributes of an event that is about to be written."""

    id: str
    source: str
    tenant_id: str
    subject_id: str | None = None
    request_id: str | None = None
    deadline: datetime | None = None
    traceparent: str | None = None
    sequence: int | None = None
    correlation_id: str | None = None
    time: datetime = field(default_factory=lambda: datetime.now(UTC))


@value_class
class Encoded:
    """One record, ready to be sent or stored."""

    headers: list[tuple[str, bytes]]
    value: bytes


def encode(data: EventData, envelope: Envelope) -> Encoded:
    """The record of `data`. Raises InvalidError `event_too_large` above 900 KiB (rules of the log, 7)."""
    value = data.model_dump_json(exclude_none=True).encode()
    if len(value) > MAXIMUM_EVENT_BYTES:
        raise InvalidError("event_too_large", f"The event has {len(value)} bytes; at most {MAXIMUM_EVENT_BYTES} are allowed.")
    return Encoded(_headers(data.event_type, envelope), value)


def _headers(event_type: str, envelope: Envelope) -> list[tuple[str, bytes]]:
    headers = [
        ("ce_specversion", _SPECIFICATION),
        ("ce_id", envelope.id.encode()),
        ("ce_source", envelope.source.encode()),
        ("ce_type", event_type.encode()),
        ("ce_time", rfc3339(envelope.time).encode()),
        ("ce_tenantid", envelope.tenant_id.encode()),
    ]
    if envelope.subject_id is not None:
        headers.append(("ce_subjectid", envelope.subject_id.encode()))
    if envelope.request_id is not None:
        headers.append(("ce_requestid", envelope.request_id.encode()))
    if envelope.deadline is not None:
        headers.append(("ce_deadline", rfc3339(envelope.deadline).encode()))
    if envelope.traceparent is not None:
        headers.append(("ce_traceparent", envelope.traceparent.encode()))
    if envelope.sequence is not None:
        headers.append(("ce_sequence", str(envelope.sequence).encode()))
    if envelope.correlation_id is not None:
        headers.append(("ce_correlationid", envelope.correlation_id.encode()))
    headers.append((_CONTENT_TYPE, _JSON))
    return headers


def rfc3339(moment: datetime) -> str:
    """A moment in UTC as RFC 3339 has it."""
    return (moment if moment.tzinfo is UTC else moment.astimezone(UTC)).isoformat()[: -len("+00:00")] + "Z"


def attributes_of(headers: Headers) -> dict[str, str]:
    """The CloudEvents attributes among `headers`, whatever their worth; broken UTF-8 is replaced. Never raises."""
    return {
        attribute: (value or b"").decode(errors="replace") for name, value in headers if (attribute := _attribute_name(name)) is not None
    }


@lru_cache(maxsize=_REMEMBERED)
def _attribute_name(header: str) -> str | None:
    name = header.lower()
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


def decode(record: Record, topic: Topic, name: str) -> Received[EventData]:
    """The event in a record of `topic`, validated.

    `name` is the topic's name without an operator's prefix. Events from ingestion are read closed, others open (rules of the log, 5).
    Raises InvalidError with one of the codes `event_too_large`, `attribute_missing`, `attribute_invalid`, `specversion_unsupported`,
    `content_type_unsupported`, `event_type_unknown`, `tenant_missing`, `tenant_invalid`, `tenant_mismatch`, `data_malformed` and
    `data_invalid`.
    """
    _check_size(record)
    attributes = attributes_of(record.headers)
    event_class = _event_class(attributes, topic, record.headers)
    tenant_id = tenant_of(attributes, name)
    identifier, source = _required(attributes, "id"), _required(attributes, "source")
    return Received(
        data=_data(record.value, event_class, written_as=attributes["type"], closed=topic.name == INGESTION),
        id=identifier,
        source=source,
        type=event_class.event_type,
        time=_moment(attributes, "time") or datetime.fromtimestamp(record.timestamp / 1000, UTC),
        tenant_id=tenant_id,
        subject_id=_optional(attributes, "subjectid"),
        request_id=_optional(attributes, "requestid"),
        deadline=_moment(attributes, "deadline"),
        traceparent=_optional(attributes, "traceparent"),
        sequence=_sequence(attributes),
        correlation_id=_optional(attributes, "correlationid"),
        key=record.key,
        topic=name,
        partition=record.partition,
        offset=record.offset,
        digest=identity_digest(tenant_id, source, identifier),
    )


def tenant_of(attributes: Mapping[str, str], name: str) -> str:
    """The tenant of a record on topic `name`: the topic's own, else the believed `tenantid` header (rules of the log, 2).

    Raises InvalidError `tenant_mismatch`, `tenant_missing` or `tenant_invalid`.
    """
    owner, claimed = tenant_of_topic(name), attributes.get("tenantid")
    if owner is not None and claimed not in (None, owner):
        raise InvalidError("tenant_mismatch", f"The topic {name!r} belongs to another tenant than the tenantid attribute says.", "tenantid")
    tenant_id = owner or claimed
    if not tenant_id:
        raise InvalidError("tenant_missing", "An event on a shared topic needs the attribute tenantid.", "tenantid")
    if not is_tenant_id(tenant_id):
        raise InvalidError("tenant_invalid", "The attribute tenantid is not a tenant's id.", "tenantid")
    return tenant_id


def is_tenant_id(value: str) -> bool:
    """Whether `value` has the form of a tenant's id (it may still be unknown)."""
    return _TENANT_ID.fullmatch(value) is not None


_TENANT_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def _check_size(record: Record) -> None:
    size = len(record.value or b"")
    framed = size + len(record.key or b"") + sum([len(name) + len(value or b"") for name, value in record.headers])
    if size > MAXIMUM_EVENT_BYTES or framed > _MAXIMUM_FRAMED_BYTES:
        raise InvalidError("event_too_large", f"The event has {size} bytes of data; at most {MAXIMUM_EVENT_BYTES} are allowed.")


def _event_class(attributes: Mapping[str, str], topic: Topic, headers: Headers) -> type[EventData]:
    if _required(attributes, "specversion") != SPECIFICATION_VERSION:
        raise InvalidError("specversion_unsupported", "Only CloudEvents 1.0 is read.", "specversion")
    _check_content_type(headers)
    wanted = _required(attributes, "type")
    for event_class in topic.event_types:
        if event_class.event_type == wanted:
            return event_class
    found = next((event for event in topic.event_types if UPCASTERS.reaches(wanted, event)), None)
    if found is None:
        known = ", ".join(event.event_type for event in topic.event_types)
        raise InvalidError("event_type_unknown", f"The topic carries {known}; not the type that the event names.", "type")
    return found


def _check_content_type(headers: Headers) -> None:
    for name, value in headers:
        if name == _CONTENT_TYPE or name.lower() == _CONTENT_TYPE:
            if value and not _is_json(value):
                break
            return
    else:
        return
    raise InvalidError("content_type_unsupported", f"Data must be {CONTENT_TYPE}, in CloudEvents' binary mode.", "datacontenttype")


@lru_cache(maxsize=_REMEMBERED)
def _is_json(content_type: bytes) -> bool:
    return content_type.decode(errors="replace").split(";", 1)[0].strip().lower() == CONTENT_TYPE


def _required(attributes: Mapping[str, str], name: str) -> str:
    value = _optional(attributes, name)
    if not value:
        raise InvalidError("attribute_missing", f"The header ce_{name} is missing.", name)
    return value


def _optional(attributes: Mapping[str, str], name: str) -> str | None:
    value = attributes.get(name)
    if value is None:
        return None
    if (len(value) > _SURELY_SHORT and len(value.encode()) > _MAXIMUM_ATTRIBUTE_BYTES) or "\x00" in value or "�" in value:
        raise InvalidError("attribute_invalid", f"The attribute {name} is too long or no clean UTF-8.", name)
    return value


def _moment(attributes: Mapping[str, str], name: str) -> datetime | None:
    value = _optional(attributes, name)
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidError("attribute_invalid", f"The attribute {name} is not an RFC 3339 moment.", name) from None
    if moment.tzinfo is None:
        raise InvalidError("attribute_invalid", f"The attribute {name} has no time zone.", name)
    return moment


def _sequence(attributes: Mapping[str, str]) -> int | None:
    value = _optional(attributes, "sequence")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise InvalidError("attribute_invalid", "The attribute sequence is not a whole number from 0.", "sequence")
    return int(value)


def _data(value: bytes | None, event_class: type[D], *, written_as: str, closed: bool) -> D:
    if not value:
        raise InvalidError("data_malformed", "The event has no data.")
    try:
        if written_as != event_class.event_type:
            value = json.dumps(UPCASTERS.lifted(written_as, from_json(value), event_class)).encode()
        return event_class.model_validate_json(value, extra="forbid" if closed else "ignore")
    except ValidationError as error:
        raise _as_invalid(error, loose_data(value)) from None
    except ValueError as error:
        raise InvalidError("data_malformed", f"The data is no JSON: {error}.") from None


def _as_invalid(error: ValidationError, data: Any) -> InvalidError:
    """The first fault, without the offending value: refusals must not carry content."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidError("data_malformed", f"The data is no JSON: {first['msg']}.")
    path = ".".join(_path(first["loc"], data, absent=first["type"] == "missing"))[:256] or None
    more = f" ({error.error_count() - 1} more faults)" if error.error_count() > 1 else ""
    return InvalidError("data_invalid", f"{path or 'data'}: {first['msg']}{more}.", path)


def _path(location: Sequence[str | int], data: Any, *, absent: bool) -> Iterator[str]:
    """The steps that exist in the data (or would, for a missing field); pydantic also names the branch of a union that it tried."""
    for number, step in enumerate(location, 1):
        found = _child(data, step)
        if found is not _NOTHING:
            data = found
        elif not (absent and number == len(location)):
            continue
        yield str(step)


def _child(data: Any, step: str | int) -> Any:
    if isinstance(step, int):
        return data[step] if isinstance(data, list) and step < len(data) else _NOTHING
    return data.get(step, _NOTHING) if isinstance(data, dict) else _NOTHING


def loose_data(value: bytes | None) -> Any:
    """The JSON of a value that need not be valid; None where there is none. Never raises."""
    try:
        return json.loads(value or b"null")
    except (ValueError, RecursionError):
        return None
