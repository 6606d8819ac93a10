"""Connections that are reset at any byte, on the loop that services run on: callers meet errors that say so, and afterwards all is well."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import asyncpg
import pytest
import uvloop
from pydantic import SecretStr
from redis.exceptions import RedisError
from sqlalchemy import text

from tessera.resilience import CircuitOpenError
from tessera.storage import (
    Database,
    DirectStatement,
    PostgresSettings,
    RedisSettings,
    StorageConflictError,
    StorageTimeoutError,
    StorageUnavailableError,
    driver_of,
    redis_client,
)
from tessera.testkit.fault_proxy import FAIR, FaultProxy, Weather
from tessera.testkit.stack import Stack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]
_OURS = (StorageUnavailableError, StorageConflictError, StorageTimeoutError, CircuitOpenError)
_SECONDS = 4.0


def behind(port: int) -> FaultProxy:
    proxy = FaultProxy(port)
    proxy.start()
    return proxy


def resets(proxy: FaultProxy) -> Callable[[float], Awaitable[None]]:
    """Resets everything again and again, and each connection after so many bytes; fair weather in the end."""

    async def storm(until: float) -> None:
        randomness = random.Random(7)
        while time.monotonic() < until:
            await asyncio.to_thread(proxy.reset_all)
            await asyncio.to_thread(proxy.turn, Weather(resets_after_bytes=randomness.randint(300, 6_000)))
            await asyncio.sleep(randomness.uniform(0.02, 0.3))
        await asyncio.to_thread(proxy.turn, FAIR)

    return storm


def ended_sessions(admin_url: str, database: str) -> Callable[[float], Awaitable[None]]:
    """Postgres ends every session again and again, and now and then lets nobody in; open in the end."""

    async def storm(until: float) -> None:
        admin = await asyncpg.connect(admin_url)
        allowed = True
        try:
            while time.monotonic() < until or not allowed:
                allowed = not allowed
                await admin.execute(f'ALTER DATABASE "{database}" WITH ALLOW_CONNECTIONS {str(allowed).lower()}')
                await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database)
                await asyncio.sleep(0.15)
        finally:
            await admin.close()

    return storm


def hammered(
    storm: Callable[[float], Awaitable[None]],
    work: Callable[[], Awaitable[None]],
    close: Callable[[], Awaitable[None]],
    expected: tuple[type[Exception], ...],
) -> list[BaseException]:
    """Runs `work` in several tasks under the storm, then once more in fair weather; what it raised beside what is expected."""
    odd: list[BaseException] = []

    async def again_and_again(until: float) -> None:
        while time.monotonic() < until:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                if not isinstance(error, expected) or is_circular(error):
                    odd.append(error)
                await asyncio.sleep(0.01)

    async def run() -> None:
        await work()
        until = time.monotonic() + _SECONDS
        await asyncio.gather(storm(until), *(again_and_again(until) for _ in range(8)))
        deadline = time.monotonic() + 20
        for _ in range(30):
            while True:
                try:
                    await work()
                    break
                except expected:
                    assert time.monotonic() < deadline, "it does not recover"
                    await asyncio.sleep(0.1)
        await close()

    uvloop.run(run())
    return odd


def is_circular(error: BaseException | None) -> bool:
    """Whether whoever follows the chain of causes never returns. CPython breaks circles of contexts only, and not all."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return error is not None


def asking(database: Database) -> Callable[[], Awaitable[None]]:
    """A transaction of two statements and a statement by itself."""

    async def work() -> None:
        async with database.transaction() as connection:
            await connection.execute(text("SELECT repeat('x', 500)"))
            await connection.execute(text("SELECT 1"))
            await DirectStatement("SELECT repeat('z', 600)").rows(driver_of(connection), {})
        async with database.driver() as driver:
            await DirectStatement("SELECT repeat('y', 700)").rows(driver, {})

    return work


def test_postgres_whose_sessions_end(postgres: PostgresSettings, admin_url: SecretStr) -> None:
    database = Database("sample", postgres)
    storm = ended_sessions(admin_url.get_secret_value(), postgres.database)
    odd = hammered(storm, asking(database), database.close, _OURS)
    assert not odd, odd[:3]


def test_postgres(postgres: PostgresSettings) -> None:
    proxy = behind(postgres.port)
    database = Database("sample", postgres.model_copy(update={"port": proxy.port}))
    try:
        odd = hammered(resets(proxy), asking(database), database.close, _OURS)
    finally:
        proxy.stop()
    assert not odd, odd[:3]


def test_redis(stack: Stack) -> None:
    port = urlsplit(stack.redis_url).port
    assert port is not None
    proxy = behind(port)
    client = redis_client(RedisSettings(url=stack.redis_url.replace(f":{port}", f":{proxy.port}")))

    async def work() -> None:
        await client.set("resets", b"v" * 300, ex=60)
        await client.get("resets")

    try:
        odd = hammered(resets(proxy), work, client.aclose, (RedisError,))
    finally:
        proxy.stop()
    assert not odd, odd[:3]
