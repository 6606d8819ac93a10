"""The small HTTP port every service has for its operators: /health/live, /health/ready and /metrics."""

import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence

import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tessera.telemetry.health import Health

Endpoint = Callable[[Request], Awaitable[Response]]


def admin_app(health: Health, *, routes: Sequence[BaseRoute] = (), registry: CollectorRegistry = REGISTRY) -> Starlette:
    """An ASGI application: `/health/live` and `/health/ready` answer 200 or 503 with a JSON report, `/metrics` Prometheus text.

    `routes` are a service's own additions.
    """
    return Starlette(
        routes=[
            Route("/health/live", _live(health)),
            Route("/health/ready", _ready(health)),
            Route("/metrics", _metrics(registry)),
            *routes,
        ]
    )


def _live(health: Health) -> Endpoint:
    async def live(_: Request) -> Response:
        report = await health.live()
        return JSONResponse(report.model_dump(), status_code=200 if report.live else 503)

    return live


def _ready(health: Health) -> Endpoint:
    async def ready(_: Request) -> Response:
        report = await health.ready()
        return JSONResponse(report.model_dump(), status_code=200 if report.ready else 503)

    return ready


def _metrics(registry: CollectorRegistry) -> Endpoint:
    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return metrics


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises OSError when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the service decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_admin(
    health: Health, host: str, port: int, *, routes: Sequence[BaseRoute] = (), bound_socket: socket.socket | None = None
) -> None:
    """Serves `admin_app` until cancelled, then closes its connections. Raises OSError at once when the address is taken.

    `bound_socket` (from `listening_socket`) replaces host and port where the caller must know the port before.
    """
    listener = bound_socket or listening_socket(host, port)
    config = uvicorn.Config(
        admin_app(health, routes=routes), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, ws="none"
    )
    server = _Server(config)
    try:
        await server.serve(sockets=[listener])
    finally:
        if server.started and not server.should_exit:
            await server.shutdown(sockets=[listener])
        listener.close()
