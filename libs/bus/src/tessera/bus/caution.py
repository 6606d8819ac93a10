"""A limit on dead letters: a consumer that refuses one event after the other is stopped instead of draining its topics.

Not counted is what is the producers' own fault on `ingest` (decision 0009): one of them could stop all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class LetterLimit:
    """When a consumer is halted."""

    consecutive: int
    """After so many dead letters in a row."""
    share: float
    """Or when this share of the last `window` events went to the dead letters."""
    window: int = 1_000


class LetterGuard:
    """Counts what becomes of a consumer's events in this process. One per consumer; `reason` is None until the limit is reached."""

    def __init__(self, limit: LetterLimit) -> None:
        self._limit = limit
        self._row = 0
        self._recent: deque[tuple[int, int]] = deque()
        self._events = self._letters = 0
        self.reason: str | None = None

    @property
    def room(self) -> int:
        """How many further dead letters in a row are tolerated."""
        return 0 if self.reason else self._limit.consecutive - self._row

    def passed(self, events: int) -> None:
        """Notes events that were handled."""
        if events:
            self._row = 0
            self._note(events, 0)

    def count(self, letters: Iterable[bool]) -> None:
        """Notes events in their order: whether each became a dead letter that counts."""
        for is_letter in letters:
            self._row = self._row + 1 if is_letter else 0
            self._note(1, int(is_letter))
            self._judge()

    def forgive(self) -> None:
        """Begins anew: an operator wants the consumer to go on."""
        self._row = self._events = self._letters = 0
        self._recent.clear()
        self.reason = None

    def _note(self, events: int, letters: int) -> None:
        self._recent.append((events, letters))
        self._events, self._letters = self._events + events, self._letters + letters
        while self._events - self._recent[0][0] >= self._limit.window:
            gone = self._recent.popleft()
            self._events, self._letters = self._events - gone[0], self._letters - gone[1]

    def _judge(self) -> None:
        if self.reason is None and self._row >= self._limit.consecutive:
            self.reason = f"{self._row} events in a row went to the dead letters"
        if self.reason is None and self._letters >= self._limit.share * self._limit.window:
            self.reason = f"{self._letters} of the last {self._events} events went to the dead letters"


@dataclass(frozen=True, slots=True)
class HandlerLimits:
    """How long one event may take, and how it is repeated where its key waits."""

    handler: timedelta
    """A longer call of a handler is cut off and counts as a failure without a reason."""
    attempts: int
    """Failures with a reason until the event is stuck."""
    initial: timedelta
    maximum: timedelta
    parked: int
    """Most events parked on one partition; beyond, the partition waits."""
