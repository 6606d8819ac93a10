"""TLS in front of a server that was built without it, as the packaged Postgres and Redis are."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tessera.local.certificates import Certificate
from tessera.local.ports import LOOPBACK

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")  # https://www.postgresql.org/docs/18/protocol-message-formats.html, SSLRequest
_PIECE = 64 * 1024
_STOP_SECONDS = 10


class TlsProxy:
    """Listens on a free loopback port, ends TLS and passes the bytes on to `target_port`. Runs on a thread of its own.

    `postgres=True` speaks Postgres' SSLRequest first and closes connections that begin without it. With `client_authority` only
    clients with a certificate of that authority get through.
    """

    def __init__(self, target_port: int, certificate: Certificate, *, postgres: bool = False, client_authority: Path | None = None) -> None:
        self.connections = 0
        """Clients that came through the handshake."""
        self._target_port = target_port
        self._postgres = postgres
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.use(certificate)
        if client_authority is not None:
            self._context.load_verify_locations(client_authority)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls-proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def use(self, certificate: Certificate) -> None:
        """Show this certificate to every new client."""
        self._context.load_cert_chain(certificate.certificate_file, certificate.key_file)

    @property
    def port(self) -> int:
        """Where it listens. Raises RuntimeError before `start`."""
        if self._server is None:
            raise RuntimeError("the proxy is not running")
        return int(self._server.sockets[0].getsockname()[1])

    def start(self) -> None:
        """Begin to listen. Blocks until it does."""
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, LOOPBACK, 0, ssl=None if self._postgres else self._context))

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
                if not self._postgres or await self._upgraded(reader, writer):
                    self.connections += 1
                    await self._pass_on(reader, writer)
            finally:
                writer.close()

    async def _upgraded(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if await reader.readexactly(len(_SSL_REQUEST)) != _SSL_REQUEST:
            return False
        writer.write(b"S")
        await writer.start_tls(self._context)
        return True

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(LOOPBACK, self._target_port)
        try:
            both = [asyncio.create_task(_pump(reader, to_writer)), asyncio.create_task(_pump(to_reader, writer))]
            _, open_ones = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for one in open_ones:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        finally:
            to_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()
