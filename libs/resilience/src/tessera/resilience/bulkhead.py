"""A limit on how many calls run at once, so that one slow dependency cannot take every worker."""

import asyncio
from types import TracebackType

from tessera.resilience.errors import BulkheadFullError


class Bulkhead:
    """`async with bulkhead:` lets `limit` blocks run at once; others wait in order of arrival.

    With `waiting` given, a caller who would make the queue longer than that gets BulkheadFullError at once.
    """

    def __init__(self, limit: int, *, waiting: int | None = None) -> None:
        if limit < 1:
            raise ValueError("limit must be at least 1")
        self.limit = limit
        self._waiting_limit = waiting
        self._slots = asyncio.Semaphore(limit)
        self._running = 0
        self._waiting = 0

    @property
    def running(self) -> int:
        """Blocks inside now."""
        return self._running

    @property
    def waiting(self) -> int:
        """Callers in the queue now."""
        return self._waiting

    async def __aenter__(self) -> None:
        if self._slots.locked() and self._waiting_limit is not None and self._waiting >= self._waiting_limit:
            raise BulkheadFullError(f"{self._running} calls run and {self._waiting} wait already")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._running -= 1
        self._slots.release()
