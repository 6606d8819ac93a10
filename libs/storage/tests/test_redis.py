import asyncio
import time

import pytest
from redis.exceptions import RedisError

from tessera.storage import RedisSettings, redis_client
from tessera.testkit.stack import Stack


@pytest.mark.integration
async def test_it_speaks_bytes(stack: Stack) -> None:
    client = redis_client(RedisSettings(url=stack.redis_url))
    await client.set("storage-test", b"\x00value", ex=5)
    assert await client.get("storage-test") == b"\x00value"
    await client.aclose()


@pytest.mark.unit
async def test_a_black_hole_costs_little_time() -> None:
    """A server that accepts and never answers; the library's defaults would wait half a minute."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = redis_client(RedisSettings(url=f"redis://127.0.0.1:{port}/0", timeout_seconds=0.1, retries=1))
    started = time.monotonic()
    with pytest.raises(RedisError):
        await client.get("key")
    assert time.monotonic() - started < 1.5
    await client.aclose()
    server.close()


@pytest.mark.unit
async def test_no_server_fails_at_once() -> None:
    client = redis_client(RedisSettings(url="redis://127.0.0.1:1/0"))
    with pytest.raises(RedisError):
        await client.ping()
    await client.aclose()
