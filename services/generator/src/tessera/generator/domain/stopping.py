"""Stop sequences over text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text on until a stop sequence is complete, wherever the pieces were cut.

    The sequence that is complete first wins, the longest where two are complete at once, so the result depends on the
    text alone and never on its pieces. Text that may be the beginning of a stop sequence is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a stop nothing is shown any more."""
        if self.stopped:
            return ""
        pending = self._held + text
        found = self._first_complete(pending)
        if found is not None:
            self.stopped, self._held = True, ""
            return pending[:found]
        kept = self._held_length(pending)
        self._held = pending[len(pending) - kept :]
        return pending[: len(pending) - kept]

    def finish(self) -> str:
        """What was held back: the text ended, so it is no stop sequence."""
        rest, self._held = self._held, ""
        return rest

    def _first_complete(self, text: str) -> int | None:
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(matches)[1] if matches else None

    def _held_length(self, text: str) -> int:
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        return next((length for length in lengths if self._begins_a_stop(text[-length:])), 0)

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
