"""Keeps libraries from filling the log with one sentence while a dependency is away."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

WINDOW = timedelta(seconds=10)
_KEPT = 1_000
"""Sentences remembered at most; beyond it all are forgotten and said once more."""


class Repeats(logging.Filter):
    """Lets one sentence of the loggers named (and those below them) pass once a window; the next one says how many were left out.

    A sentence is a logger with its message before the arguments are filled in. Safe across threads.
    """

    def __init__(self, *loggers: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._loggers = loggers
        self._clock = clock
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; `repeated` on it counts those that were not."""
        if not any(record.name == name or record.name.startswith(f"{name}.") for name in self._loggers):
            return True
        sentence = (record.name, str(record.msg))
        until, left_out = self._said.get(sentence, (0.0, 0))
        if self._clock() < until:
            self._said[sentence] = (until, left_out + 1)
            return False
        if len(self._said) >= _KEPT:
            self._said.clear()
        self._said[sentence] = (self._clock() + WINDOW.total_seconds(), 0)
        if left_out:
            record.repeated = left_out
        return True
