"""Hears from Postgres what other transactions did, without asking all the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import asyncpg

from tessera.memory.adapters.indexing import CHANNEL
from tessera.storage import Database

PROGRESS: Final = "tessera_memory_progress"
"""Notified by Postgres whenever ingestion moved on, or something can be found that could not."""
_PROBE_SECONDS: Final = 5.0


class Announcements:
    """Sets the events whenever index work is added by any replica, and calls `progressed` whenever a reader may have waited for it.

    While Postgres is away the workers' and readers' polling stands in.
    """

    def __init__(self, database: Database, *listeners: asyncio.Event, progressed: Callable[[], None] = lambda: None) -> None:
        self._database = database
        self._listeners = listeners
        self._progressed = progressed

    async def run(self, stopping: asyncio.Event) -> None:
        """Listens until `stopping` is set or the connection is lost; then raises, and is to be started again."""
        connection = await self._database.connect()
        try:
            await connection.add_listener(CHANNEL, self._heard)
            await connection.add_listener(PROGRESS, self._heard_of_progress)
            self._announce()
            self._progressed()
            while not stopping.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), _PROBE_SECONDS)
                # A connection that is only listened on does not notice that it was cut.
                await connection.execute("SELECT 1", timeout=_PROBE_SECONDS)
        finally:
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                await connection.close(timeout=_PROBE_SECONDS)

    def _heard(self, *_notification: Any) -> None:
        self._announce()

    def _heard_of_progress(self, *_notification: Any) -> None:
        self._progressed()

    def _announce(self) -> None:
        for listener in self._listeners:
            listener.set()
