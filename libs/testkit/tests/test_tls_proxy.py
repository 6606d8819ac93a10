"""A TLS proxy that stops leaves no connection, whatever its clients do."""

import socket
import ssl
from collections.abc import Iterator

import pytest

from tessera.local.certificates import Authority
from tessera.testkit.tls_proxy import TlsProxy

pytestmark = pytest.mark.unit
PATIENCE = 10.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.create()
    return made


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def proxy(authority: Authority, server: socket.socket) -> TlsProxy:
    return TlsProxy(server.getsockname()[1], authority.issue("server"))


def _client(proxy: TlsProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), PATIENCE)


def test_a_client_that_never_begins_its_handshake_is_left_behind(proxy: TlsProxy) -> None:
    proxy.handshake_seconds = 0.3
    proxy.start()
    with _client(proxy) as silent:
        proxy.stop()
        assert silent.recv(1) == b""


def test_a_client_that_does_not_end_its_session_is_left_behind(proxy: TlsProxy, server: socket.socket, authority: Authority) -> None:
    proxy.start()
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    with _client(proxy) as plain:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        _shake_hands(session, plain, incoming, outgoing)
        passed_on, _ = server.accept()
        proxy.stop()
        assert passed_on.recv(1) == b""
        passed_on.close()
        while plain.recv(1024):  # what the proxy says before it goes; a client of this kind says nothing back
            pass


def _shake_hands(session: ssl.SSLObject, plain: socket.socket, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
    while True:
        try:
            session.do_handshake()
        except ssl.SSLWantReadError:
            plain.sendall(outgoing.read())
            incoming.write(plain.recv(65536))
        else:
            plain.sendall(outgoing.read())
            return
