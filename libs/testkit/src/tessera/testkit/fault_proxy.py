"""A TCP proxy that makes connections slow, holds their bytes back, or breaks them."""

import asyncio
import socket
import struct
from dataclasses import dataclass

from tessera.testkit.proxy import PIECE, Proxy

_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close() sends RST


@dataclass(frozen=True)
class Weather:
    """What happens to every connection of a proxy, open ones too."""

    latency_seconds: float = 0.0
    """Added to each piece, either way."""
    bytes_per_second: int | None = None
    """Of each connection, either way."""
    holds_to_server: bool = False
    """Nothing reaches the server; connections stay open."""
    holds_to_client: bool = False
    """No answer comes back; connections stay open."""
    closes_after_seconds: float = 0.0
    """When the server closes, the client hears of it so much later."""
    resets_after_bytes: int | None = None
    """Each connection is reset once so much came from the server: in the middle of an answer."""


FAIR = Weather()


class FaultProxy(Proxy):
    """Passes bytes on as the `weather` of the moment says. Starts fair."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self._weather = FAIR
        self._changed = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()

    def turn(self, weather: Weather) -> None:
        """Applies to what is under way as well. Returns once it does."""
        self._run(self._turn(weather))

    def reset_all(self) -> None:
        """Every open connection is reset, on both sides."""
        self._run(self._reset_all())

    async def _turn(self, weather: Weather) -> None:
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()

    async def _reset_all(self) -> None:
        for writer in tuple(self._open):
            _reset(writer)

    async def _pass_on(
        self, client: tuple[asyncio.StreamReader, asyncio.StreamWriter], server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> None:
        mine = {client[1], server[1]}
        self._open |= mine
        try:
            await super()._pass_on(client, server)
            await asyncio.sleep(self._weather.closes_after_seconds)
        finally:
            self._open -= mine

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool) -> None:
        passed = 0
        while piece := await reader.read(PIECE):
            await self._delay(len(piece), to_server=to_server)
            passed += len(piece)
            limit = self._weather.resets_after_bytes
            if not to_server and limit is not None and passed > limit:
                _reset(writer)
                return
            writer.write(piece)
            await writer.drain()

    async def _delay(self, size: int, *, to_server: bool) -> None:
        while self._weather.holds_to_server if to_server else self._weather.holds_to_client:
            await self._changed.wait()
        rate = self._weather.bytes_per_second
        await asyncio.sleep(self._weather.latency_seconds + (size / rate if rate else 0.0))


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:  # negative: it has been closed meanwhile
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    writer.transport.abort()
