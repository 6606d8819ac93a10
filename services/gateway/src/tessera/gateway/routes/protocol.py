"""HTTP/1.1 on the wire, for a server that never switches to another protocol."""

from typing import Final

import httptools
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tessera.contracts import uuid7
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.routes.problems import error_response

_OF_THE_OFFER: Final = frozenset({b"upgrade", b"http2-settings"})
"""Headers, and what the header Connection calls them."""


class UnswitchingProtocol(HttpToolsProtocol):
    """Serves a request that offers to switch to another protocol as if it did not (RFC 9110, section 7.8).

    Java's HttpClient, Ktor and `curl --http2` make such an offer with their first request. The parser stops at the end of its headers, and
    with uvicorn its body is lost, or taken for another request (https://github.com/Kludex/uvicorn/issues/2722). Here it is parsed again.
    """

    def data_received(self, data: bytes) -> None:
        """Parses what came."""
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._fed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """Begins the request, unless it is to be parsed again."""
        if not self._offers_to_switch:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends its body, unless it is to be parsed again."""
        if not self._offers_to_switch:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed gets the error object, too."""
        answer = error_response(ApiError(400, "bad_request", msg), {"connection": "close", "x-request-id": f"req_{uuid7().hex}"})
        self.transport.write(_on_the_wire(answer))
        self.transport.close()

    def _fed(self, data: bytes) -> bytes:
        """What is to be parsed again."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            return self._without_the_offer() + data[stopped.args[0] :] if self._offers_to_switch else b""
        return b""

    @property
    def _offers_to_switch(self) -> bool:
        """Not CONNECT, which is an offer by itself: what follows it is nobody's request."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _without_the_offer(self) -> bytes:
        """The head of the request."""
        fields = [(name, value) for name, value in self.headers if name not in _OF_THE_OFFER and name != b"connection"]
        tokens = [token.strip() for name, value in self.headers if name == b"connection" for token in value.split(b",")]
        kept = [token for token in tokens if token.lower() not in _OF_THE_OFFER]
        fields += [(b"connection", b", ".join(kept))] if kept else []
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return b"\r\n".join([line, *(b"%s: %s" % field for field in fields), b"", b""])


def _on_the_wire(answer: Response) -> bytes:
    lines = [b"HTTP/1.1 %d Bad Request" % answer.status_code, *(b"%s: %s" % field for field in answer.raw_headers)]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])
