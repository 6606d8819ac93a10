"""Calls the handlers of a transactional consumer: each within its time, neighbours of one type together where the handler takes many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus.delivery import handling, handling_together
from tessera.bus.events import Received
from tessera.bus.outbox import OutboxRow
from tessera.bus.partitions import PASSING
from tessera.bus.registry import Registration, Registry
from tessera.bus.transaction import BatchTransaction, Transaction
from tessera.contracts.base import EventData
from tessera.contracts.errors import RetryableError
from tessera.resilience import CircuitOpenError
from tessera.storage import Database, ObjectsUnavailableError, StorageConflictError, StorageTimeoutError, StorageUnavailableError

BUDGET: Final = timedelta(seconds=5)
"""A transaction begins no further event after this time: with one last handler it stays well below Postgres' own limit of 30 s."""


class PostponedError(RetryableError):
    """A handler failed for a passing reason that is not the service's own Postgres: the event is to be tried again later."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause) or type(cause).__name__, code=getattr(cause, "code", None))


class HandlerTimeoutError(Exception):
    """A handler took longer than its class may. Nothing says why: it counts as a failure without a reason."""


def is_own_storage(error: BaseException, database: Database) -> bool:
    """Whether the service's own Postgres is what failed: then no event is to blame, and none is put off.

    Told apart by the class of the error alone: what `Database` raises, or its breaker. A handler that meets another dependency's
    failure raises RetryableError, or lets that dependency's breaker or time-out through.
    """
    if isinstance(error, CircuitOpenError):
        return error.name == database.breaker.name
    storage = (StorageUnavailableError, StorageConflictError, StorageTimeoutError)
    return isinstance(error, storage) and not isinstance(error, ObjectsUnavailableError)


class Calls:
    """The handlers of one consumer, as its transactions call them.

    Raises what a handler raises, PostponedError for its passing failures that are not the service's own Postgres, and HandlerTimeoutError.
    """

    def __init__(self, group: str, service: str, registry: Registry, database: Database, limit: timedelta) -> None:
        self._group = group
        self._service = service
        self._registry = registry
        self._database = database
        self._limit = limit.total_seconds()

    async def each(self, connection: AsyncConnection, events: Sequence[Received[EventData]], rows: list[OutboxRow]) -> int:
        """Hands over the events in order, as many as the time allows, at least one; returns how many."""
        done, until = 0, time.monotonic() + BUDGET.total_seconds()
        while done < len(events) and (done == 0 or time.monotonic() < until):
            registration = self._registry[events[done].type]
            end = _run_end(events, done) if registration.batched else done + 1
            await self._call(registration, connection, events[done:end], rows)
            done = end
        return done

    async def one(self, connection: AsyncConnection, event: Received[EventData], rows: list[OutboxRow]) -> None:
        """Hands over one event."""
        await self._call(self._registry[event.type], connection, [event], rows)

    async def _call(
        self, registration: Registration, connection: AsyncConnection, events: Sequence[Received[EventData]], rows: list[OutboxRow]
    ) -> None:
        if registration.batched:
            with handling_together(events, self._group):
                await self._limited(registration.handler(events, BatchTransaction(connection, self._service, rows)))
            return
        (event,) = events
        with handling(event, self._group):
            await self._limited(registration.handler(event, Transaction(connection, event.origin, self._service, rows)))

    async def _limited(self, handler: Awaitable[None]) -> None:
        """Awaits a handler within its time, and says of a passing failure whose it is."""
        limit = asyncio.timeout(self._limit)
        try:
            async with limit:
                await handler
        except PASSING as error:
            if is_own_storage(error, self._database):
                raise
            raise PostponedError(error) from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise HandlerTimeoutError(f"a handler took longer than {self._limit:g} s") from error


def _run_end(events: Sequence[Received[EventData]], start: int) -> int:
    """Where the neighbours of one type end."""
    end = start + 1
    while end < len(events) and events[end].type == events[start].type:
        end += 1
    return end
