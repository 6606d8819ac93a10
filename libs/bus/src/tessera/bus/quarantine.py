"""Keeps an event that may have killed the process apart from all others, so that the next death has one suspect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Quarantine:
    """Handlers run side by side, except that a suspect runs alone in the whole process. Costs nothing while there is none."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._running = 0
        self._suspects = 0

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """The block runs beside others; it waits while a suspect runs or waits."""
        if self._suspects:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._suspects)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._suspects:
                await self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """The block runs by itself, once everything that runs now has ended."""
        self._suspects += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._running)
                yield
        finally:
            self._suspects -= 1
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
