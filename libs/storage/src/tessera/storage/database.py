"""The one way in which a service reaches its Postgres."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tessera.contracts.errors import InvalidError
from tessera.resilience import Breaker
from tessera.storage import connections
from tessera.storage.direct import begin, driver_of
from tessera.storage.errors import READ_ONLY, StorageUnavailableError, sqlstate, translated
from tessera.storage.ping import ping_before_use
from tessera.storage.settings import PostgresSettings, Role

OnConnect = Callable[[asyncpg.Connection], Awaitable[None]]

_NO_CONNECTION = (OSError, TimeoutError, DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)
_SET_TENANT = text("SELECT set_config('app.tenant', :tenant, true)")


class Database:
    """Transactions in a service's schema, as one of its roles. Nothing is opened before the first use.

    Every transaction runs under `breaker`. Raises CircuitOpenError (nothing was tried), StorageUnavailableError, StorageConflictError or
    StorageTimeoutError, all worth another try; a wrong statement raises SQLAlchemy's own error, and whatever the block raises goes through
    after the roll-back. For one event loop.
    """

    def __init__(self, service: str, settings: PostgresSettings) -> None:
        self.service = service
        self.breaker = Breaker(
            "postgres",
            failure_threshold=settings.breaker_failure_threshold,
            reset_after=timedelta(seconds=settings.breaker_reset_seconds),
            failures=(StorageUnavailableError,),
        )
        self._settings = settings
        self._engines: dict[Role, AsyncEngine] = {}
        self._on_connect: list[OnConnect] = []

    def on_connect(self, initialize: OnConnect) -> None:
        """Has `initialize` awaited with every connection opened from now on (type codecs). Call it before the first transaction."""
        self._on_connect.append(initialize)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction of the worker role, which sees every tenant: commits when the block ends, rolls back when it raises."""
        async with self._transaction("worker") as connection:
            yield connection

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[asyncpg.Connection]:
        """The driver's connection of the worker role, for `DirectStatement`s: each commits by itself, in one round trip, not three."""
        async with self.breaker.guard():
            connection = await self._connected("worker")
            try:
                async with _forgotten_when_lost(connection):
                    yield driver_of(connection)
            except Exception as error:
                known = translated(error)
                if known is None:
                    raise
                raise known from error
            finally:
                await connection.close()

    @asynccontextmanager
    async def reading(self, tenant_id: str) -> AsyncIterator[AsyncConnection]:
        """One read-only snapshot (REPEATABLE READ) of the client role, in which only rows of `tenant_id` exist."""
        async with self._transaction("client", tenant_id, isolation_level="REPEATABLE READ", postgresql_readonly=True) as connection:
            yield connection

    @asynccontextmanager
    async def writing(self, tenant_id: str) -> AsyncIterator[AsyncConnection]:
        """One transaction of the client role, in which only rows of `tenant_id` exist and only granted tables can be written."""
        async with self._transaction("client", tenant_id) as connection:
            yield connection

    @asynccontextmanager
    async def authenticating(self) -> AsyncIterator[AsyncConnection]:
        """One transaction of the authenticator role, which may execute look-up functions and see no table (the gateway's)."""
        async with self._transaction("authenticator") as connection:
            yield connection

    async def check(self) -> None:
        """Returns when Postgres answers the worker role, raises as a transaction does when not. Half open, it is the breaker's probe."""
        async with self.transaction() as connection:
            await connection.execute(text("SELECT 1"))

    async def connect(self) -> asyncpg.Connection:
        """A worker's connection outside the pool (LISTEN, COPY); the caller closes it. Raises StorageUnavailableError."""
        try:
            return await self._opened(**connections.connect_arguments(self.service, "worker", self._settings))
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise _unavailable(error) from error

    async def close(self) -> None:
        """Closes every pooled connection; the next transaction would open new ones. Safe to call twice."""
        engines, self._engines = self._engines, {}
        for engine in engines.values():
            await engine.dispose()

    @asynccontextmanager
    async def _transaction(self, role: Role, tenant_id: str | None = None, **options: Any) -> AsyncIterator[AsyncConnection]:
        if tenant_id == "":
            raise InvalidError("tenant_required", "a tenant is required")
        async with self.breaker.guard():
            connection = await self._connected(role)
            try:
                if options:
                    await connection.execution_options(**options)
                async with connection.begin(), _forgotten_when_lost(connection):
                    await begin(connection)
                    if tenant_id is not None:
                        await connection.execute(_SET_TENANT, {"tenant": tenant_id})
                    yield connection
            except Exception as error:
                known = translated(error)
                if known is None or (sqlstate(error) == READ_ONLY and "postgresql_readonly" in options):
                    raise
                raise known from error
            finally:
                await connection.close()

    async def _connected(self, role: Role) -> AsyncConnection:
        connection = self._engine(role).connect()
        try:
            return await connection.start()
        except Exception as error:
            # No statement of ours has been tried yet: whatever the server says here, it is not to be used now.
            if isinstance(error, _NO_CONNECTION) or translated(error) is not None:
                raise _unavailable(error) from error
            raise

    def _engine(self, role: Role) -> AsyncEngine:
        if role not in self._engines:
            self._engines[role] = self._new_engine(role)
        return self._engines[role]

    def _new_engine(self, role: Role) -> AsyncEngine:
        settings = self._settings
        arguments = connections.connect_arguments(self.service, role, settings)
        engine = create_async_engine(
            "postgresql+asyncpg://",
            connect_args={**arguments, "async_creator_fn": self._opened, "prepared_statement_cache_size": settings.statement_cache_size},
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            pool_timeout=settings.pool_timeout_seconds,
            pool_recycle=settings.recycle_seconds,
            pool_use_lifo=True,
            hide_parameters=True,  # errors are logged and kept with dead letters: they must not carry people's texts
        )
        if settings.pre_ping:
            ping_before_use(engine, idle=timedelta(seconds=settings.pre_ping_idle_seconds))
        return engine

    async def _opened(self, **arguments: Any) -> asyncpg.Connection:
        connection = await asyncpg.connect(**arguments)
        for initialize in self._on_connect:
            await initialize(connection)
        return connection


@asynccontextmanager
async def _forgotten_when_lost(connection: AsyncConnection) -> AsyncIterator[None]:
    """SQLAlchemy does not see what the driver meets: told that a connection is gone, it neither rolls back there nor keeps it."""
    try:
        yield
    except (Exception, asyncio.CancelledError) as error:
        if not connection.invalidated and _is_lost(connection, error):
            await connection.invalidate()
        raise


def _is_lost(connection: AsyncConnection, error: BaseException) -> bool:
    """Also where whoever asked gave up: the answer may still come."""
    gone = isinstance(error, asyncio.CancelledError) or driver_of(connection).is_closed()
    return gone or (isinstance(error, Exception) and isinstance(translated(error), StorageUnavailableError))


def _unavailable(error: Exception) -> StorageUnavailableError:
    known = translated(error)
    return (
        known
        if isinstance(known, StorageUnavailableError)
        else StorageUnavailableError(f"Postgres cannot be reached: {error or type(error).__name__}")
    )
