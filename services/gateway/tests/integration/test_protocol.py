"""HTTP/1.1 as it comes by the wire: offers to switch, and what is no HTTP."""

import json
import socket
from typing import Any

import pytest

from tessera.gateway.domain.errors import ApiError

pytestmark = pytest.mark.integration

OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
ITEM = json.dumps({"type": "message", "conversation_id": "c", "role": "user", "content": "offered"})
LENGTH = f"Content-Length: {len(ITEM)}\r\n\r\n"
CHUNKED = f"Transfer-Encoding: chunked\r\n\r\n5\r\n{ITEM[:5]}\r\n{len(ITEM) - 5:x}\r\n{ITEM[5:]}\r\n0\r\n\r\n"


def asked(gateway: Any, *pieces: str | bytes) -> list[tuple[int, dict[str, Any]]]:
    """Status and body of each answer on one connection, which the last request closes. Each piece travels alone."""
    host, port = gateway.process.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece.encode() if isinstance(piece, str) else piece)
        received = b""
        while more := connection.recv(65_536):
            received += more
    answers = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in head.split(b"\r\n")[1:])}
        length = int(fields[b"content-length"])
        answers.append((int(head.split(b" ")[1]), json.loads(rest[:length])))
        received = rest[length:]
    return answers


def post(gateway: Any, more: str) -> str:
    return f"POST /v1/memories HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\nContent-Type: application/json\r\n{more}"


def last(gateway: Any) -> str:
    return f"GET /v1/models/none HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("offer", [OFFER, OFFER.replace("h2c", "websocket"), "Upgrade: TLS/1.2\r\nConnection: keep-alive, UPGRADE\r\n", ""])
@pytest.mark.parametrize("body", [LENGTH + ITEM, CHUNKED])
def test_an_offer_to_switch_is_not_taken_and_the_request_is_whole(gateway: Any, offer: str, body: str) -> None:
    (first, _), (second, _) = asked(gateway, post(gateway, offer + body), last(gateway))
    assert (first, second) == (202, 404)


def test_wherever_it_is_cut(gateway: Any) -> None:
    whole = post(gateway, OFFER + LENGTH + ITEM)
    for at in (20, whole.index("Upgrade:") + 3, whole.index("\r\n\r\n") + 2, whole.index("\r\n\r\n") + 4, len(whole) - 5):
        assert [status for status, _ in asked(gateway, whole[:at], whole[at:], last(gateway))] == [202, 404]
    assert [status for status, _ in asked(gateway, whole + whole + last(gateway))] == [202, 202, 404]


def test_a_body_behind_an_offer_is_nobodys_request(gateway: Any) -> None:
    smuggled = f"GET /v1/tenants HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n\r\n"
    hidden = post(gateway, f"{OFFER}Content-Length: {len(smuggled)}\r\n\r\n")
    answers = asked(gateway, hidden, smuggled, last(gateway))
    assert [status for status, _ in answers] == [400, 404]
    assert answers[0][1]["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\na b: c\r\n\r\n",
    ],
    ids=["TLS", "HTTP/2", "no HTTP", "a bad header"],
)
def test_what_is_no_http_is_told_so(gateway: Any, nonsense: bytes) -> None:
    ((status, body),) = asked(gateway, nonsense)
    assert (status, body) == (400, ApiError(400, "bad_request", "Invalid HTTP request received.").body())
