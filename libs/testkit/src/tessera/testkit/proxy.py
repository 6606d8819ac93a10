"""A TCP proxy on a thread of its own; what it does to connections is a subclass's."""

import asyncio
import contextlib
import selectors
import ssl
import threading
from collections.abc import Coroutine
from typing import Any

from tessera.local.ports import LOOPBACK

PIECE = 64 * 1024
_STOP_SECONDS = 10
_LOOK_SECONDS = 0.01
_OWN = 1
"""What a loop without connections has in its selector: the pipe that wakes it."""


class Proxy:
    """Listens on a free loopback port and passes the bytes of every connection on to `target_port`.

    `context` ends TLS in front of the target.
    """

    handshake_seconds = 5.0
    """The longest that a client's TLS handshake may take."""

    def __init__(self, target_port: int, context: ssl.SSLContext | None = None) -> None:
        self.target_port = target_port
        self._accept_context = context
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
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
        patience = self.handshake_seconds if self._accept_context is not None else None
        self._server = self._run(asyncio.start_server(self._accept, LOOPBACK, 0, ssl=self._accept_context, ssl_handshake_timeout=patience))

    def stop(self) -> None:
        """Close every connection, whatever its client does. Blocks until all are; raises TimeoutError when one stays."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_STOP_SECONDS)

    async def _close(self) -> None:
        self._stopping = True
        # Closed at the end: asyncio loses a connection that it has just accepted when the server closes.
        for listening in self._server.sockets if self._server else ():
            self._loop.remove_reader(listening.fileno())
        # A handshake that is under way is a task of the loop's, not ours, and ends by its own time-out.
        while len(asyncio.all_tasks()) > 1 or len(self._selector.get_map()) > _OWN:
            for task in self._tasks:
                task.cancel()
            await asyncio.sleep(_LOOK_SECONDS)
        if self._server is not None:
            self._server.close()

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
                self._end(writer)

    async def _admitted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether this client gets through."""
        return True

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(LOOPBACK, self.target_port)
        try:
            await self._pass_on((reader, writer), (to_reader, to_writer))
        finally:
            self._end(to_writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        """At a stop nobody waits for a client to agree that its TLS session is over."""
        if self._stopping:
            writer.transport.abort()
        else:
            writer.close()

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
