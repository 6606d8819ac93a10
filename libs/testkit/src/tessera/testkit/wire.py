"""A TCP wire to a server, which a test cuts and mends: what is behind it goes away without being harmed."""

import socket
import threading
from contextlib import suppress

from tessera.local.ports import LOOPBACK, free_ports

_PIECE = 64 * 1024


class Wire:
    """Listens on a loopback port of its own and passes bytes on to `target_port`, on threads. Whole at first."""

    def __init__(self, target_port: int) -> None:
        self.port = free_ports(("wire",))["wire"]
        self._target_port = target_port
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._changing = threading.Lock()
        self.mend()

    def mend(self) -> None:
        """Take connections (again). May be called on a whole wire."""
        if self._listener is None:
            self._listener = socket.create_server((LOOPBACK, self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection and refuse new ones. May be called on a cut wire."""
        listener, self._listener = self._listener, None
        with self._changing:
            ends = [*([listener] if listener else []), *self._open]
            self._open.clear()
        for end in ends:
            _close(end)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._connect(near, listener)

    def _connect(self, near: socket.socket, listener: socket.socket) -> None:
        try:
            far = socket.create_connection((LOOPBACK, self._target_port))
        except OSError:
            _close(near)
            return
        with self._changing:
            if self._listener is not listener:  # cut meanwhile
                _close(near)
                _close(far)
                return
            self._open += [near, far]
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            sink.sendall(piece)
    _close(source)
    _close(sink)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
