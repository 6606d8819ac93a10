"""The base of every event class, and the limits that hold for producers who never meet the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, StringConstraints

MAXIMUM_EVENT_BYTES: Final = 900 * 1024
MAXIMUM_CONTENT_CHARACTERS: Final = 100_000
MAXIMUM_DOCUMENT_CHARACTERS: Final = 800_000
MAXIMUM_METADATA_BYTES: Final = 16 * 1024
MAXIMUM_METADATA_LEVELS: Final = 8


class Record(BaseModel):
    """A closed, immutable piece of an event. Readers open it with `extra="ignore"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but validated: what exists keeps its contract, so writers need not check again. Raises ValidationError."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self).model_validate({**dict(self), **update})


class EventData(Record):
    """The data of one event type in its newest version; a subclass is one type."""

    event_type: ClassVar[str] = ""


def event_version(event: type[EventData]) -> int:
    """The version in a type's name: 1 for `tessera.message.published.v1`."""
    return int(event.event_type.rsplit(".v", 1)[1])


class RequestData(EventData):
    """A question whose answer goes to one partition of the reply topic, fixed for the request's life."""

    reply_partition: Annotated[int, Field(ge=0, le=1023, description="Partition of the reply topic that the asker reads.")]


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo is UTC else moment.astimezone(UTC)


def _rfc3339(moment: datetime) -> str:
    return _utc(moment).isoformat()[: -len("+00:00")] + "Z"


def _bounded_metadata(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if _levels(value) > MAXIMUM_METADATA_LEVELS:
        raise ValueError(f"metadata is nested deeper than {MAXIMUM_METADATA_LEVELS} levels")
    if len(_as_json(value)) > MAXIMUM_METADATA_BYTES:
        raise ValueError(f"metadata is larger than {MAXIMUM_METADATA_BYTES} bytes")
    if any("\x00" in text for text in _texts(value)):
        raise ValueError("metadata must not contain the character U+0000")
    return value


def _as_json(value: dict[str, JsonValue]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("metadata must not contain unpaired surrogates") from None
    except ValueError:
        raise ValueError("metadata must not contain NaN, infinite numbers, or integers of thousands of digits") from None


def _texts(value: Any) -> Iterator[str]:
    """Every string and key within bounded metadata."""
    if isinstance(value, str):
        yield value
    children = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _texts(child)


def _levels(value: Any) -> int:
    """Depth of nesting, by a stack of its own: the input is hostile until measured."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        if children is None:
            continue
        deepest = max(deepest, level)
        if deepest > MAXIMUM_METADATA_LEVELS:
            break
        stack.extend((child, level + 1) for child in children)
    return deepest


def _no_nul(value: str) -> str:
    """Postgres text cannot hold U+0000, so no field of an event may."""
    if "\x00" in value:
        raise ValueError("text must not contain the character U+0000")
    return value


Moment = Annotated[AwareDatetime, AfterValidator(_utc), PlainSerializer(_rfc3339, when_used="json")]
Text = Annotated[str, AfterValidator(_no_nul)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=128)]
TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Metadata = Annotated[
    dict[str, JsonValue],
    AfterValidator(_bounded_metadata),
    Field(description=f"Free JSON: at most {MAXIMUM_METADATA_BYTES} bytes and {MAXIMUM_METADATA_LEVELS} levels."),
]
NO_METADATA: Any = Field(default_factory=dict, json_schema_extra={"default": {}})
"""The default of metadata. Given as `{}`, pydantic would copy it with `deepcopy` for each event, which takes longer than validation."""
Content = Annotated[Text, StringConstraints(min_length=1, max_length=MAXIMUM_CONTENT_CHARACTERS)]
DocumentContent = Annotated[Text, StringConstraints(min_length=1, max_length=MAXIMUM_DOCUMENT_CHARACTERS)]
