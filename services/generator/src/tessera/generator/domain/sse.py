"""Server-sent events from bytes (WHATWG HTML, §9.2.6 "Interpreting an event stream")."""

from __future__ import annotations

from typing import Final

MAXIMUM_EVENT_BYTES: Final = 1024 * 1024
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class OversizedEventError(ValueError):
    """An event, or a line of it, is larger than `MAXIMUM_EVENT_BYTES`."""


class EventStreamParser:
    """Turns bytes, cut anywhere, into the data of events. Field names other than `data` are of no use here and skipped."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []
        self._size = 0
        self._at_start = True
        self._skip_newline = False

    def feed(self, received: bytes) -> list[bytes]:
        """The data of every event that is complete now. Raises OversizedEventError."""
        self._buffer += received
        if self._at_start and not self._strip_mark():
            return []
        events: list[bytes] = []
        while (line := self._next_line()) is not None:
            self._take(line, events)
        self._check_size()
        return events

    def finish(self) -> list[bytes]:
        """What a server that forgot the last blank line left behind."""
        events: list[bytes] = []
        self._take(self._buffer, events)
        self._take(b"", events)
        self._buffer = b""
        return events

    def _strip_mark(self) -> bool:
        if len(self._buffer) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(self._buffer):
            return False
        self._buffer = self._buffer.removeprefix(_BYTE_ORDER_MARK)
        self._at_start = False
        return True

    def _next_line(self) -> bytes | None:
        if self._skip_newline and self._buffer:
            self._buffer = self._buffer.removeprefix(b"\n")
            self._skip_newline = False
        ends = [position for end in (b"\r", b"\n") if (position := self._buffer.find(end)) >= 0]
        if not ends:
            return None
        position = min(ends)
        line, ending = self._buffer[:position], self._buffer[position : position + 1]
        self._buffer = self._buffer[position + 1 :]
        self._skip_newline = ending == b"\r"
        return line

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            self._dispatch(events)
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)

    def _dispatch(self, events: list[bytes]) -> None:
        if self._data:
            events.append(b"\n".join(self._data))
        self._data, self._size = [], 0

    def _check_size(self) -> None:
        if max(len(self._buffer), self._size) > MAXIMUM_EVENT_BYTES:
            raise OversizedEventError(f"an event of the stream is larger than {MAXIMUM_EVENT_BYTES} bytes")
