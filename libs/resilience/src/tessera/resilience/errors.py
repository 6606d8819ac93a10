"""What the guards raise themselves. All of it is worth another try later.

ResilienceError
├── CircuitOpenError     the breaker lets nothing through now
├── TimedOutError        the deadline passed (also a TimeoutError)
└── BulkheadFullError    too many callers wait already
"""

from datetime import timedelta


class ResilienceError(Exception):
    """Base of everything raised by this library."""


class CircuitOpenError(ResilienceError):
    """The call was not made because the dependency failed too often; `retry_after` is when the next probe may be let through."""

    def __init__(self, name: str, retry_after: timedelta) -> None:
        super().__init__(f"the circuit breaker of {name} is open; try again in {retry_after.total_seconds():.1f} s")
        self.name = name
        self.retry_after = retry_after


class TimedOutError(ResilienceError, TimeoutError):
    """The deadline passed before the block was done; the block was cancelled."""


class BulkheadFullError(ResilienceError):
    """The call was not made because the limit of waiting callers was reached."""
