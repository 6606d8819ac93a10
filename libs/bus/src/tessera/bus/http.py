"""HTTP servers of a service: several processes on one port, and a stop that lets open streams end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import uvicorn

_BACKLOG: Final = 2_048


def shared_socket(host: str, port: int) -> socket.socket:
    """A socket that other processes may share (SO_REUSEPORT), not listening yet: until then they get what comes.

    Raises OSError when the address is taken otherwise.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers: the runtime decides when it ends. With `tls` it speaks nothing else."""

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        *,
        drain: timedelta,
        tls: ssl.SSLContext | None = None,
        protocol: type[asyncio.Protocol] | None = None,
    ) -> None:
        self._socket = shared_socket(host, port)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http=protocol or "auto",
                lifespan="auto",
                ws="none",
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, int(drain.total_seconds())),
                ssl_context_factory=(lambda *_: tls) if tls else None,
            )
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    def listen(self) -> None:
        """From now on connections come here; they wait until `run_until_told` takes them."""
        self._socket.listen(_BACKLOG)

    async def run_until_told(self) -> None:
        """Serves until `leave`; then accepts nothing new, and open streams may end within the drain deadline."""
        await self.serve(sockets=[self._socket])

    def leave(self) -> None:
        """Begins the stop."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """No signals here."""
        yield
