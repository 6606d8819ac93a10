"""What asking over the bus can end with.

TesseraError
├── RequestFailedError   the answer was a problem
└── StreamExpiredError   the log no longer holds that position
TimedOutError            no answer before the deadline (tessera.resilience)
"""

from __future__ import annotations

from tessera.contracts.errors import InvalidError, Problem, TesseraError
from tessera.resilience import TimedOutError

__all__ = ["RequestFailedError", "StreamExpiredError", "TimedOutError"]


class RequestFailedError(TesseraError):
    """The service answered that it cannot answer; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message, code=problem.code)
        self.problem = problem


class StreamExpiredError(InvalidError):
    """The position to resume from has left the log."""

    def __init__(self, message: str) -> None:
        super().__init__("stream_expired", message)
