"""LISTEN: wakes this process's workers the moment a transaction with a job or a cancellation commits."""

from __future__ import annotations

import asyncio
import json
from typing import Protocol

import asyncpg

from tessera.contracts import RetryableError
from tessera.generator.adapters.postgres_jobs import CHANNEL
from tessera.storage import Database
from tessera.telemetry import get_logger

_log = get_logger(__name__)


class Wakeable(Protocol):
    """Who is woken."""

    def job_ready(self, provider: str) -> None:
        """A job of the provider may be due."""

    def job_cancelled(self, tenant_id: str, generation_id: str) -> None:
        """A job was cancelled."""

    def everything(self) -> None:
        """Notifications may have been missed."""


class JobListener:
    """Holds one connection that listens. Without it, workers still poll."""

    def __init__(self, database: Database, signals: Wakeable) -> None:
        self._database = database
        self._signals = signals

    async def run(self, stopping: asyncio.Event) -> None:
        """Listens until `stopping` is set. Raises RetryableError when the connection is lost, for whoever restarts it."""
        connection = await self._database.connect()
        lost = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(CHANNEL, self._notified)
            self._signals.everything()
            waiting = [asyncio.create_task(event.wait()) for event in (lost, stopping)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        finally:
            if not connection.is_closed():
                await connection.close()
        if not stopping.is_set():
            raise RetryableError("The connection that listens for jobs was lost.", code="storage_unavailable")

    def _notified(self, connection: asyncpg.Connection, pid: int, channel: str, payload: object) -> None:
        kind, _, rest = str(payload).partition(" ")
        if kind == "ready":
            self._signals.job_ready(rest)
        elif kind == "cancelled":
            tenant_id, generation_id = json.loads(rest)
            self._signals.job_cancelled(tenant_id, generation_id)
        else:
            _log.warning("unknown_job_notification", kind=kind)
