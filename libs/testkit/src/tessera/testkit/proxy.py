"""A TCP proxy on a thread of its own; what it does to connections is a subclass's."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Coroutine
from typing import Any

from tessera.local.ports import LOOPBACK

PIECE = 64 * 1024
_STOP_SECONDS = 10


class Proxy:
    """Listens on a free loopback port and passes the bytes of every connection on to `target_port`.

    `context` ends TLS in front of the target.
    """

    def __init__(self, target_port: int, context: ssl.SSLContext | None = None) -> None:
        self.target_port = target_port
        self._accept_context = context
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Where it listens. Raises RuntimeError before `start`."""
        if self._server is None:
            raise RuntimeError("the proxy is not running")
        return int(self._server.sockets[0].getsockname()[1])

    def start(self) -> None:
        """Begin to listen. Blocks until it does."""
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, LOOPBACK, 0, ssl=self._accept_context))

    def stop(self) -> None:
        """Close every connection. Blocks until all are."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_STOP_SECONDS)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a callback of start_server is a task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                if await self._admitted(reader, writer):
                    await self._connect(reader, writer)
            finally:
                writer.close()

    async def _admitted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether this client gets through."""
        return True

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(LOOPBACK, self.target_port)
        try:
            await self._pass_on((reader, writer), (to_reader, to_writer))
        finally:
            to_writer.close()

    async def _pass_on(
        self, client: tuple[asyncio.StreamReader, asyncio.StreamWriter], server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> None:
        """Pumps both ways until one side closes."""
        both = [
            asyncio.create_task(self._pump(client[0], server[1], to_server=True)),
            asyncio.create_task(self._pump(server[0], client[1], to_server=False)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool) -> None:
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
