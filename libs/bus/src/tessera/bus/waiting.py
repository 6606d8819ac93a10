"""Readers who wait for a projection: each a task of its own, without a consumer's slot and without a database connection."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from tessera.telemetry import get_logger, metrics

Attempt = Callable[[bool], Awaitable[bool]]
"""Looks once and says whether that was the end of it; told True, it is the last look and must be."""

FIRST_PAUSE_SECONDS: Final = 0.02
LONGEST_PAUSE_SECONDS: Final = 1.0
SHORTEST_PAUSE_SECONDS: Final = 0.003
"""Between two looks of one reader, however often it is told of progress."""

_log = get_logger(__name__)


class WaitingRoom:
    """Bounded: at most `readers` wait at once, of one tenant `per_tenant`; `looks` of them look at the same time, tenants in turn.

    They look again when told that something moved (`changed`), else after a pause that doubles up to a second. For one event loop.
    """

    def __init__(self, *, looks: int = 4, readers: int = 512, per_tenant: int = 128) -> None:
        self._turns = Turns(looks)
        self._readers = readers
        self._per_tenant = per_tenant
        self._waiting: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._closing = False

    def __len__(self) -> int:
        return len(self._tasks)

    def admits(self, tenant_id: str) -> bool:
        """Whether one more reader of this tenant may wait."""
        return not self._closing and len(self._tasks) < self._readers and self._waiting[tenant_id] < self._per_tenant

    def admit(self, tenant_id: str, attempt: Attempt, until: float) -> None:
        """Has `attempt` called until it says that it is done, the last time at `until` of the loop's clock. Returns at once.

        Ask `admits` before. What `attempt` raises is logged and ends the waiting.
        """
        self._waiting[tenant_id] += 1
        self._begin(self._wait(tenant_id, attempt, until), tenant_id)

    def changed(self) -> None:
        """Something moved: whoever waits looks again."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """A worker: once `stopping` is set nobody waits any longer; everybody looks a last time, and is gone when this returns."""
        self._closing = False
        await stopping.wait()
        self._closing = True
        self.changed()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _begin(self, waiting: Coroutine[Any, Any, None], tenant_id: str) -> None:
        task = asyncio.create_task(waiting)
        self._tasks.add(task)
        metrics.READERS_WAITING.inc()
        task.add_done_callback(lambda done: self._ended(done, tenant_id))

    def _ended(self, task: asyncio.Task[None], tenant_id: str) -> None:
        self._tasks.discard(task)
        metrics.READERS_WAITING.dec()
        self._waiting[tenant_id] -= 1
        if not self._waiting[tenant_id]:
            del self._waiting[tenant_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a reader stopped waiting by an unexpected error", error=repr(error))

    async def _wait(self, tenant_id: str, attempt: Attempt, until: float) -> None:
        clock, pause = asyncio.get_running_loop().time, FIRST_PAUSE_SECONDS
        while True:
            news = self._news
            last = self._closing or clock() >= until
            async with self._turns.of(tenant_id):
                if await attempt(last) or last:
                    return
            await asyncio.sleep(SHORTEST_PAUSE_SECONDS)
            # Scattered, so that readers who came together do not look together for ever.
            limit = min(pause * random.uniform(0.8, 1.2), max(0.0, until - clock()))  # noqa: S311  # nosec B311 - no secret
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), limit)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


class Turns:
    """`async with turns.of(tenant)` lets `limit` blocks run at once, tenants in turn, however many wait of each."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Tenants in the order of their turns."""

    @asynccontextmanager
    async def of(self, tenant_id: str) -> AsyncIterator[None]:
        """Waits for a turn."""
        await self._taken(tenant_id)
        try:
            yield
        finally:
            self._pass_on()

    async def _taken(self, tenant_id: str) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant_id, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Gives the turn to the next tenant's first, who then stands behind the others."""
        while self._queues:
            tenant_id = next(iter(self._queues))
            queue = self._queues.pop(tenant_id)
            turn = queue.popleft()
            if queue:
                self._queues[tenant_id] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
