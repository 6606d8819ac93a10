"""A provider that speaks the OpenAI API and says what a test tells it to: the shared platform offers its models."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHAT, COMPLETION = "remote/chat", "remote/text"
KNOWN = "gpt-4o-mini"
"""For clients that speak only to models whose names they know."""

Document = dict[str, Any]


def said(content: str, index: int = 0, **choice: Any) -> Document:
    """A chunk of a chat."""
    return {"choices": [{"index": index, "delta": {"content": content}, "finish_reason": None, **choice}]}


def called(name: str, arguments: str) -> Document:
    """A chunk of a chat that calls a tool."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}


def completed(text: str, reason: str | None = None) -> Document:
    """A chunk of a completion."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def ended(reason: str = "stop", index: int = 0) -> Document:
    """The last chunk of a choice."""
    return {"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}


def usage(prompt_tokens: int, completion_tokens: int) -> Document:
    """The chunk that `include_usage` asks for."""
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


@dataclass
class Upstream:
    """Answers each request with the same script, until it is told another; keeps what it was asked."""

    requests: list[Document] = field(default_factory=list)
    _status: int = 200
    _headers: dict[str, str] = field(default_factory=dict)
    _parts: Sequence[Document] = ()
    _streams: bool = True

    def says(self, *parts: Document) -> None:
        """A stream of these."""
        self._tell(200, parts)

    def answers(self, document: Document) -> None:
        """One document, as to a request without `stream`."""
        self._tell(200, [document], streams=False)

    def refuses(self, status: int, error: Document, **headers: str) -> None:
        """An error, however often it is asked."""
        self._tell(status, [{"error": error}], streams=False, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def _tell(self, status: int, parts: Sequence[Document], *, streams: bool = True, headers: dict[str, str] | None = None) -> None:
        self.requests.clear()
        self._status, self._parts, self._streams, self._headers = status, parts, streams, headers or {}

    def settings(self) -> dict[str, str]:
        """What makes the generator offer its models."""
        models = [{"id": CHAT, "exact": True}, {"id": KNOWN}, {"id": COMPLETION, "capability": "completion"}]
        offered = {"name": "remote", "base_url": self.base_url, "models": models, "attempts": 1}
        return {"TESSERA_GENERATOR__PROVIDERS": json.dumps([offered])}

    @contextmanager
    def running(self) -> Iterator["Upstream"]:
        """Serves on the loop-back interface until the block ends."""
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                upstream.requests.append({"path": self.path, **body})
                self._answer(upstream)

            def _answer(self, upstream: Upstream) -> None:
                self.send_response(upstream._status)
                self.send_header("content-type", "text/event-stream" if upstream._streams else "application/json")
                for name, value in upstream._headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in upstream._parts:
                    line = json.dumps(part)
                    self.wfile.write((f"data: {line}\n\n" if upstream._streams else line).encode())
                    self.wfile.flush()
                if upstream._streams:
                    self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *_: Any) -> None:
                """Not on a test's output."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            serving.join()
