"""Retry, circuit breaker, time-out and bulkhead for calls to anything that can fail; knows no Kafka, no telemetry.

Use one event loop per object: nothing here is safe across threads.
"""

from tessera.resilience.breaker import Breaker, BreakerState
from tessera.resilience.bulkhead import Bulkhead
from tessera.resilience.deadline import deadline
from tessera.resilience.errors import (
    BulkheadFullError,
    CircuitOpenError,
    ResilienceError,
    TimedOutError,
)
from tessera.resilience.retry import RetryPolicy, retrying

__all__ = [
    "Breaker",
    "BreakerState",
    "Bulkhead",
    "BulkheadFullError",
    "CircuitOpenError",
    "ResilienceError",
    "RetryPolicy",
    "TimedOutError",
    "deadline",
    "retrying",
]
