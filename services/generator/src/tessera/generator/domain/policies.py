"""How workers and providers behave, as settings decide."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Final

from tessera.resilience import RetryPolicy

_PROVIDER_RETRY: Final = RetryPolicy(attempts=3, initial=timedelta(milliseconds=250), maximum=timedelta(seconds=5))


@dataclass(frozen=True)
class WorkerPolicy:
    """How jobs are leased and how their text is sent."""

    lease: timedelta = timedelta(seconds=15)
    """Without a heartbeat for this long another worker takes the job over."""
    poll: timedelta = timedelta(seconds=1)
    """How long a missed wake-up may delay a job."""
    coalesce: timedelta = timedelta(milliseconds=45)
    """Pieces that come within it travel as one chunk; the first never waits."""
    keep_finished: timedelta = timedelta(days=1)
    """Rows of ended jobs stay as long as a late duplicate of their request may come."""

    tenant_share: float = 0.75
    """Of an engine's slots, the most that one tenant may hold."""

    def tenant_limit(self, concurrency: int) -> int:
        """Most jobs of one tenant at once: one slot at least stays for others, unless there is only one."""
        return max(1, min(ceil(concurrency * self.tenant_share), concurrency - 1 if self.tenant_share < 1 else concurrency))

    @property
    def heartbeat(self) -> timedelta:
        """Two missed heartbeats are forgiven."""
        return self.lease / 3


@dataclass(frozen=True)
class ProviderPolicy:
    """How one provider is called. Nothing is sent again once an answer has begun."""

    connect_timeout: timedelta = timedelta(seconds=5)
    read_timeout: timedelta = timedelta(seconds=60)
    """Longest silence: before the first byte (the prompt may be long) and between two."""
    retry: RetryPolicy = _PROVIDER_RETRY
    maximum_retry_after: timedelta = timedelta(seconds=10)
    """A provider that asks for a longer pause is not waited for."""
    breaker_failures: int = 5
    breaker_reset: timedelta = timedelta(seconds=15)
    stream_usage: bool = True
    limit_field: str = "max_tokens"
    """Ask for the usage in the stream; off for servers that refuse `stream_options`."""
