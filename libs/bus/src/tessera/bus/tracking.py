"""Which offset may be committed while events are finished out of order."""

from __future__ import annotations

from collections import deque


class OffsetHead:
    """The finished head of one partition: the offset below which everything taken is finished.

    Offsets are taken in rising order (gaps are normal) and finished in any order. Invariant: nothing below `position` is unfinished, and
    the first taken offset at or above it is unfinished.
    """

    def __init__(self) -> None:
        self._taken: deque[int] = deque()
        self._finished: set[int] = set()
        self._position: int | None = None

    @property
    def position(self) -> int | None:
        """The next offset to commit; None until the first event is finished at the head."""
        return self._position

    @property
    def first(self) -> int | None:
        """The first taken offset that is not below the head."""
        return self._taken[0] if self._taken else None

    @property
    def unfinished(self) -> int:
        """How many taken offsets are not below the head."""
        return len(self._taken)

    def take(self, offset: int) -> None:
        """Notes that `offset` is in hand. Raises ValueError when it does not rise."""
        if self._taken and offset <= self._taken[-1]:
            raise ValueError(f"offset {offset} after {self._taken[-1]}")
        self._taken.append(offset)

    def finish(self, offset: int) -> None:
        """Notes that `offset` is done, and moves the head as far as it goes."""
        self._finished.add(offset)
        while self._taken and self._taken[0] in self._finished:
            head = self._taken.popleft()
            self._finished.discard(head)
            self._position = head + 1
