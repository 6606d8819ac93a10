"""A connection that was reset is told as one on uvloop, too."""

import asyncio
import contextlib

import pytest
import uvloop
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest

from tessera.bus.broken import tell_broken_connections

pytestmark = pytest.mark.unit


def test_writing_to_a_closed_connection_is_a_connection_error() -> None:
    tell_broken_connections()
    uvloop.run(_write_after_close())


async def _write_after_close() -> None:
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await reader.read()
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        connection = AIOKafkaConnection("127.0.0.1", 1)
        connection._writer = writer
        with pytest.raises(KafkaConnectionError, match="broken"):
            connection.send(ApiVersionRequest())
