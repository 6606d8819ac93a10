"""The projection of declared tenants."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

from sqlalchemy import text

from tessera.contracts.errors import RetryableError
from tessera.contracts.events import TenantChanged
from tessera.resilience import CircuitOpenError, RetryPolicy, deadline, retrying
from tessera.storage import Database

# The newest declaration wins, in whatever order they are read again.
_UPSERT = text("""
    INSERT INTO tenant AS known (tenant_id, state, changed_at) VALUES (:tenant, :state, :changed_at)
    ON CONFLICT (tenant_id) DO UPDATE SET state = excluded.state, changed_at = excluded.changed_at
        WHERE known.changed_at <= excluded.changed_at
""")
_PATIENCE: Final = RetryPolicy(attempts=None, initial=timedelta(milliseconds=100), maximum=timedelta(seconds=5))
_CAUGHT_UP_SECONDS: Final = 5.0


class PostgresTenants:
    """Keeps the table `tenant` in step with the topic `tenant.changed`, so that admission looks tenants up in its own transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._up_to_date: Callable[[], Awaitable[None]] | None = None

    def follows(self, up_to_date: Callable[[], Awaitable[None]]) -> None:
        """Names the wait for the end of the topic."""
        self._up_to_date = up_to_date

    async def put(self, changed: TenantChanged) -> None:
        """Notes a tenant's state; repeating it, or an older one, changes nothing. Waits for as long as Postgres is away."""
        await retrying(_PATIENCE, (RetryableError, CircuitOpenError))(self._put, changed)

    async def caught_up(self) -> None:
        """See Tenants. Raises TimedOutError when the topic cannot be read now."""
        if self._up_to_date is not None:
            async with deadline(_CAUGHT_UP_SECONDS):
                await self._up_to_date()

    async def _put(self, changed: TenantChanged) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(_UPSERT, {"tenant": changed.tenant, "state": changed.state, "changed_at": changed.changed_at})
