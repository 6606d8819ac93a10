"""Server-sent events (WHATWG HTML, section 9.2) as OpenAI's clients read them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


@dataclass(frozen=True)
class FrameId:
    """Where a frame came from: record `offset` of reply partition `partition`; one record can give several frames."""

    generation_id: str
    partition: int
    offset: int
    frame: int

    def __str__(self) -> str:
        return f"{self.generation_id}.{self.partition}.{self.offset}.{self.frame}"

    @classmethod
    def parse(cls, text: str) -> "FrameId | None":
        """The id in a `Last-Event-ID` header; None for anything else."""
        parts = text.rsplit(".", 3)
        if len(parts) != 4 or not parts[0] or not all(part.isascii() and part.isdigit() for part in parts[1:]):
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]), int(parts[3]))


def encode_json(value: object) -> bytes:
    """Compact UTF-8 JSON without line breaks, so that it fits one `data:` line. Lone surrogates are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def data_frame(value: Mapping[str, Any], frame_id: FrameId | None = None) -> bytes:
    """One event with a JSON body."""
    prefix = b"id: " + str(frame_id).encode() + b"\n" if frame_id else b""
    return prefix + b"data: " + encode_json(value) + b"\n\n"
