"""What happens around every request, before and after any route: identity, limits, headers, log line, span."""

import asyncio
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.contracts import uuid7
from tessera.gateway.handlers.calls import CLIENT_LEFT, Calls
from tessera.gateway.routes import deprecation
from tessera.gateway.routes.problems import as_api_error, error_response
from tessera.telemetry import bound, continued, get_logger, span

REQUEST_ID: Final = "x-request-id"

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_SECURITY_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_ONLY_ENCRYPTED: Final = "max-age=31536000"
"""Strict-Transport-Security of answers over TLS: a browser that had one asks without TLS no more for a year."""
_QUIET: Final = ("/health",)

_log = get_logger(__name__)


@dataclass(frozen=True)
class EdgeLimits:
    """What a request may cost before any route has looked at it."""

    body_bytes: int = 1024 * 1024
    upload_bytes: int = 256 * 1024 * 1024
    upload_paths: frozenset[str] = frozenset({"/v1/datasets"})
    body_timeout: timedelta = timedelta(seconds=30)
    """Longest pause between two pieces of a body."""

    def of(self, path: str) -> int:
        """The most bytes that the body of a request to `path` may have."""
        return self.upload_bytes if path in self.upload_paths else self.body_bytes


@dataclass
class _Exchange:
    """One request and its answer."""

    scope: Scope
    request_id: str
    limit: int
    started: float = field(default_factory=time.monotonic)
    received: int = 0
    status: int = 0

    @property
    def elapsed_ms(self) -> float:
        return round((time.monotonic() - self.started) * 1000, 1)


class Edge:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, limits: EdgeLimits, calls: Calls) -> None:
        self._app = app
        self._limits = limits
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(scope, _request_id(headers), self._limits.of(scope["path"]))
        with ExitStack() as around:
            # A route that learns whose request it is binds the tenant to the rest of it.
            scope["state"] = {**scope.get("state", {}), "request_id": exchange.request_id, "around": around}
            around.enter_context(bound(request_id=exchange.request_id))
            around.enter_context(continued(headers.get("traceparent")))
            current = around.enter_context(span("http.request", **{"http.request.method": scope["method"]}))
            await self._serve(exchange, headers, receive, send)
            route = getattr(scope.get("route"), "path", "unknown")
            current.update_name(f"{scope['method']} {route}")
            current.set_attribute("http.response.status_code", exchange.status)
            _log_answer(exchange, route)
            if principal := scope["state"].get("principal"):
                self._calls.note(principal, f"{scope['method']} {route}", exchange.status or CLIENT_LEFT)

    async def _serve(self, exchange: _Exchange, headers: Headers, receive: Receive, send: Send) -> None:
        send = _decorating(exchange, send)
        if _declared_length(headers) > exchange.limit:
            response = error_response(as_api_error(_too_large(exchange.limit)))
            await response(exchange.scope, receive, send)
            return
        try:
            await self._app(exchange.scope, self._bounded(exchange, receive), send)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            # What a library cancelled inside: Starlette knows no answer to it.
            await self._crashed(exchange, error, receive, send)
        except Exception as error:  # noqa: BLE001
            # Starlette has answered 500 already and raises again so that the cause is told here, once.
            await self._crashed(exchange, error, receive, send)

    async def _crashed(self, exchange: _Exchange, error: BaseException, receive: Receive, send: Send) -> None:
        _log.error("request_crashed", path=exchange.scope["path"], exc_info=error)
        if exchange.status == 0:
            await error_response(as_api_error(RuntimeError()))(exchange.scope, receive, send)

    def _bounded(self, exchange: _Exchange, receive: Receive) -> Receive:
        """Counts the body and does not wait for ever for its next piece."""
        complete = False

        async def limited() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            message = await self._patient(receive)
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            exchange.received += len(message.get("body", b""))
            if exchange.received > exchange.limit:
                raise _too_large(exchange.limit)
            return message

        return limited

    async def _patient(self, receive: Receive) -> Message:
        try:
            async with asyncio.timeout(self._limits.body_timeout.total_seconds()):
                return await receive()
        except TimeoutError:
            raise HTTPException(408, "The body of the request did not arrive in time.") from None


def _is_cancelled() -> bool:
    """Whether somebody wants this request to end, and not a library a task of its own."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body of the request is larger than {limit} bytes.")


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{uuid7().hex}"


def _declared_length(headers: Headers) -> int:
    declared = headers.get("content-length", "0")
    return int(declared) if declared.isascii() and declared.isdigit() else 0


def _decorating(exchange: _Exchange, send: Send) -> Send:
    async def decorated(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers[REQUEST_ID] = exchange.request_id
            if exchange.scope.get("scheme") == "https":
                headers["strict-transport-security"] = _ONLY_ENCRYPTED
            use = exchange.scope["state"].get("use")
            for name, value in use.headers().items() if use else ():
                headers[name] = value
            for name, value in deprecation.headers(exchange.scope).items():
                headers[name] = value
            headers["openai-processing-ms"] = str(round(exchange.elapsed_ms))
        await send(message)

    return decorated


def _log_answer(exchange: _Exchange, route: str) -> None:
    if route in _QUIET and exchange.status < 400:
        return
    scope = exchange.scope
    principal = scope.get("state", {}).get("principal")
    _log.info(
        "request_served",
        method=scope["method"],
        route=route,
        status=exchange.status or CLIENT_LEFT,
        elapsed_ms=exchange.elapsed_ms,
        tenant_id=principal.tenant_id if principal else None,
        key_id=principal.key_id if principal else None,
    )
