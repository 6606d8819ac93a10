import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tessera.telemetry import Health, listening_socket, serve_admin

pytestmark = pytest.mark.unit


async def extra(_: Request) -> Response:
    return PlainTextResponse("extra")


@pytest.fixture
def health() -> Health:
    health = Health("memory", "memory-1")
    health.phase = "serving"
    return health


@pytest.fixture
async def admin(health: Health) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a real server on a free port."""
    listener = listening_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    serving = asyncio.create_task(serve_admin(health, "127.0.0.1", port, routes=[Route("/extra", extra)], bound_socket=listener))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
        yield client
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert listener.fileno() == -1


async def failing() -> None:
    raise ConnectionError("gone")


async def test_ready_answers_with_each_dependency(health: Health, admin: httpx.AsyncClient) -> None:
    health.add_dependency("redis", required=False, check=failing, breaker_state=lambda: "open")
    answer = await admin.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    told = answer.json()["dependencies"]["redis"]
    assert (told["status"], told["required"], told["breaker"], told["error"]) == ("down", False, "open", "ConnectionError: gone")


async def test_not_ready_is_503(health: Health, admin: httpx.AsyncClient) -> None:
    health.add_dependency("postgres", required=True, check=failing)
    answer = await admin.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")


async def test_live_is_200_then_503_when_stuck(health: Health, admin: httpx.AsyncClient) -> None:
    assert (await admin.get("/health/live")).status_code == 200
    health.add_liveness("loop", failing)
    answer = await admin.get("/health/live")
    assert (answer.status_code, answer.json()["failed"]) == (503, {"loop": "ConnectionError: gone"})


async def test_metrics_are_prometheus_text(admin: httpx.AsyncClient) -> None:
    await admin.get("/health/ready")
    answer = await admin.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "tessera_dependency_up" in {family.name for family in text_string_to_metric_families(answer.text)}


async def test_a_service_may_add_routes(admin: httpx.AsyncClient) -> None:
    assert (await admin.get("/extra")).text == "extra"


async def test_a_taken_port_is_an_error_at_once(health: Health) -> None:
    with listening_socket("127.0.0.1", 0) as taken, pytest.raises(OSError, match="in use"):
        await serve_admin(health, "127.0.0.1", taken.getsockname()[1])


def test_the_other_family_of_addresses_works_too() -> None:
    with listening_socket("::1", 0) as listener:
        assert listener.getsockname()[1] > 0
