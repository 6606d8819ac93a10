"""How accepted events lie on disk while Kafka is away, and what can be read again of a file that a crash has cut (docs/hand-off.md).

A segment is a header and frames. Each frame begins with the segment's random sync marker, as in an Avro object container file: after a
broken frame the next whole one is found by it, and no event's content can pass for a frame.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import google_crc32c

MAGIC: Final = b"TESSPOOL1\n"
SYNC_BYTES: Final = 16
HEADER_BYTES: Final = len(MAGIC) + SYNC_BYTES
_SIZES: Final = struct.Struct(">II")
_ATTRIBUTES: Final = struct.Struct(">I")
FRAME_BYTES: Final = SYNC_BYTES + _SIZES.size
"""What a frame needs beside its payload."""
_DEADLINE: Final = "ce_deadline"


@dataclass(frozen=True, slots=True)
class AcceptedEvent:
    """A finished Kafka record: sent twice it is the same event twice."""

    event_id: str
    tenant_id: str
    topic: str
    key: bytes
    headers: tuple[tuple[str, bytes], ...]
    value: bytes
    accepted_at: datetime

    @property
    def event_type(self) -> str:
        """Its CloudEvents type; empty where it has none."""
        return self._attribute("ce_type")

    @property
    def source(self) -> str:
        """Its CloudEvents source; empty where it has none."""
        return self._attribute("ce_source")

    def _attribute(self, header: str) -> str:
        return next((value.decode(errors="replace") for name, value in self.headers if name == header), "")

    def expired(self, ttl: timedelta) -> "AcceptedEvent":
        """The same event with the deadline that it has missed: memory refuses it, unless an earlier copy has arrived."""
        deadline = (self.accepted_at + ttl).astimezone(UTC).isoformat().replace("+00:00", "Z")
        kept = tuple(header for header in self.headers if header[0] != _DEADLINE)
        return replace(self, headers=(*kept, (_DEADLINE, deadline.encode())))


@dataclass(frozen=True, slots=True)
class Frame:
    """An event and where its frame is in the segment."""

    event: AcceptedEvent
    offset: int
    length: int


@dataclass(frozen=True)
class Recovery:
    """What a segment still holds. `end` is where its whole part ends: what is behind it is a torn write."""

    frames: tuple[Frame, ...]
    damaged: tuple[tuple[int, int], ...]
    """(from, to) of bytes that are no frame although whole frames follow; the whole file where the header is not ours."""
    end: int


def header(sync: bytes) -> bytes:
    """The beginning of a segment."""
    return MAGIC + sync


def packed(event: AcceptedEvent) -> bytes:
    """The payload of an event's frame."""
    attributes = {
        "id": event.event_id,
        "tenant": event.tenant_id,
        "topic": event.topic,
        "key": event.key.decode("latin-1"),
        "headers": [[name, value.decode("latin-1")] for name, value in event.headers],
        "accepted_at": event.accepted_at.isoformat(),
    }
    described = json.dumps(attributes).encode()
    return _ATTRIBUTES.pack(len(described)) + described + event.value


def unpacked(payload: bytes) -> AcceptedEvent:
    """The event of a payload. Raises ValueError for anything that `packed` did not make."""
    if len(payload) < _ATTRIBUTES.size:
        raise ValueError("the payload ends within its length")
    (length,) = _ATTRIBUTES.unpack_from(payload)
    start = _ATTRIBUTES.size + length
    try:
        attributes = json.loads(payload[_ATTRIBUTES.size : start])
        return AcceptedEvent(
            event_id=attributes["id"],
            tenant_id=attributes["tenant"],
            topic=attributes["topic"],
            key=attributes["key"].encode("latin-1"),
            headers=tuple((name, value.encode("latin-1")) for name, value in attributes["headers"]),
            value=payload[start:],
            accepted_at=datetime.fromisoformat(attributes["accepted_at"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the payload is no event: {error!r}") from error


def framed(sync: bytes, payload: bytes) -> bytes:
    """The frame of a payload in the segment with this marker."""
    return sync + _SIZES.pack(len(payload), _checksum(payload)) + payload


def read_frame(data: bytes, sync: bytes) -> AcceptedEvent:
    """The event of one frame. Raises ValueError where it is not whole."""
    frame = _frame_at(data, 0, sync)
    if frame is None:
        raise ValueError("the frame is broken")
    return frame.event


def recover(data: bytes) -> Recovery:
    """Every whole frame of a segment, in order. A file that ends within its header held nothing."""
    if not data.startswith(MAGIC[: len(data)]):
        return Recovery((), ((0, len(data)),), len(data))
    if len(data) < HEADER_BYTES:
        return Recovery((), (), 0)
    frames = tuple(_whole_frames(data, data[len(MAGIC) : HEADER_BYTES]))
    damaged, at = [], HEADER_BYTES
    for frame in frames:
        if frame.offset > at:
            damaged.append((at, frame.offset))
        at = frame.offset + frame.length
    return Recovery(frames, tuple(damaged), at)


def _whole_frames(data: bytes, sync: bytes) -> Iterator[Frame]:
    at = data.find(sync, HEADER_BYTES)
    while at >= 0:
        frame = _frame_at(data, at, sync)
        if frame is not None:
            yield frame
        at = data.find(sync, at + (frame.length if frame else 1))


def _frame_at(data: bytes, at: int, sync: bytes) -> Frame | None:
    start = at + FRAME_BYTES
    if len(data) < start or data[at : at + SYNC_BYTES] != sync:
        return None
    length, checksum = _SIZES.unpack_from(data, at + SYNC_BYTES)
    payload = data[start : start + length]
    if len(payload) < length or _checksum(payload) != checksum:
        return None
    try:
        return Frame(unpacked(payload), at, FRAME_BYTES + length)
    except ValueError:
        return None


def _checksum(payload: bytes) -> int:
    """CRC32C of the length and the payload (RFC 3720, appendix B.4)."""
    return int(google_crc32c.extend(google_crc32c.value(len(payload).to_bytes(4, "big")), payload))
