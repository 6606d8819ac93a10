"""The fault proxy does to connections what it says."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tessera.testkit.fault_proxy import FAIR, FaultProxy, Weather

pytestmark = pytest.mark.unit
PATIENCE = 10.0


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # some tests reset both sides
            while piece := self.request.recv(1024):
                self.request.sendall(piece)
                if piece == b"bye":
                    return


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        made = FaultProxy(server.server_address[1])
        made.start()
        yield made
        made.stop()
        server.shutdown()
        serving.join()


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE) as made:
        yield made


def test_fair_weather_passes_everything(client: socket.socket) -> None:
    client.sendall(b"hello")
    assert client.recv(1024) == b"hello"


def test_latency_is_added_each_way(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.turn(Weather(latency_seconds=0.1))
    began = time.monotonic()
    client.sendall(b"hello")
    assert client.recv(1024) == b"hello"
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("weather", [Weather(holds_to_server=True), Weather(holds_to_client=True)])
def test_what_is_held_back_arrives_later(proxy: FaultProxy, client: socket.socket, weather: Weather) -> None:
    proxy.turn(weather)
    client.sendall(b"hello")
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1024)
    proxy.turn(FAIR)
    client.settimeout(PATIENCE)
    assert client.recv(1024) == b"hello"


def test_a_reset_in_the_middle_of_an_answer(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.turn(Weather(resets_after_bytes=3))
    client.sendall(b"abc")
    assert client.recv(1024) == b"abc"
    client.sendall(b"d")
    with pytest.raises(ConnectionResetError):
        client.recv(1024)


def test_resetting_all(proxy: FaultProxy, client: socket.socket) -> None:
    client.sendall(b"hello")
    client.recv(1024)
    proxy.reset_all()
    with pytest.raises(ConnectionResetError):
        client.recv(1024)


def test_a_slow_close(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.turn(Weather(closes_after_seconds=0.3))
    client.sendall(b"bye")
    assert client.recv(1024) == b"bye"
    began = time.monotonic()
    assert client.recv(1024) == b""
    assert time.monotonic() - began >= 0.2
