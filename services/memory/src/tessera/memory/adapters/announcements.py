"""Hears from Postgres that there is index work, without asking all the time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

import asyncpg

from tessera.memory.adapters.indexing import CHANNEL
from tessera.storage import Database

_PROBE_SECONDS: Final = 5.0


class Announcements:
    """Sets the events whenever index work is added by any replica. While Postgres is away the workers' polling stands in."""

    def __init__(self, database: Database, *listeners: asyncio.Event) -> None:
        self._database = database
        self._listeners = listeners

    async def run(self, stopping: asyncio.Event) -> None:
        """Listens until `stopping` is set or the connection is lost; then raises, and is to be started again."""
        connection = await self._database.connect()
        try:
            await connection.add_listener(CHANNEL, self._heard)
            self._announce()
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

    def _announce(self) -> None:
        for listener in self._listeners:
            listener.set()
