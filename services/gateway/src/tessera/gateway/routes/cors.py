"""Which pages of other origins may call from a browser."""

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tessera.gateway.domain.errors import ApiError
from tessera.gateway.routes.problems import error_response

_METHODS: Final = ("GET", "POST", "PUT", "DELETE")
_READABLE: Final = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "deprecation",
    "sunset",
    "link",
    *(f"x-ratelimit-{what}-{resource}" for what in ("limit", "remaining", "reset") for resource in ("requests", "tokens")),
)


class Cors:
    """Around everything, so that refusals can be read too. Nothing is added where no origin is named."""

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self._app = app
        self.allow(origins)

    def allow(self, origins: Collection[str]) -> None:
        """Only pages of `origins` may call from now on."""
        self._current = _NamedOrigins(self._app, origins) if origins else self._app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._current(scope, receive, send)


class _NamedOrigins(CORSMiddleware):
    """Starlette's. Its own refusal of a preflight is the error object."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app, allow_origins=tuple(origins), allow_methods=_METHODS, allow_headers=("*",), expose_headers=_READABLE, max_age=600
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser asks before it sends a request."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        refused = ApiError(400, "cors_not_allowed", f"{bytes(answer.body).decode()}: see the setting cors_origins.")
        return error_response(refused, {"vary": answer.headers["vary"]})
