"""Pages of other origins: those that are named may call, and read why they were refused."""

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from tessera.gateway.routes.application import application
from tessera.gateway.routes.edge import EdgeLimits
from tessera.gateway.settings import GatewaySettings

pytestmark = pytest.mark.unit

PAGE = "https://app.example.com"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type, idempotency-key"}


def browser(desk: Any, *origins: str, limits: EdgeLimits | None = None) -> httpx.AsyncClient:
    app = application(desk.rooms, limits or EdgeLimits(), origins)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers={"origin": PAGE})


async def test_a_named_origin_may_send_what_the_sdks_send(desk: Any) -> None:
    async with browser(desk, PAGE) as client:
        asked = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "POST" in asked.headers["access-control-allow-methods"]
        allowed = asked.headers["access-control-allow-headers"].lower()
        assert all(name in allowed for name in ("authorization", "content-type", "idempotency-key"))
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {desk.key}"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-ratelimit-remaining-requests" in answer.headers["access-control-expose-headers"]


async def test_refusals_can_be_read_also_those_before_any_route(desk: Any) -> None:
    async with browser(desk, PAGE, limits=EdgeLimits(body_bytes=10)) as client:
        for answer, status in (
            (await client.get("/v1/models"), 401),
            (await client.get("/nowhere"), 404),
            (await client.post("/v1/tokenize", content=b"x" * 11), 413),
        ):
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)


async def test_another_origin_is_refused_with_the_error_object(desk: Any) -> None:
    async with browser(desk, "https://other.example.com") as client:
        asked = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert (asked.status_code, asked.json()["error"]["code"]) == (400, "cors_not_allowed")
        assert "access-control-allow-origin" not in asked.headers
        assert asked.headers["vary"]
        assert "access-control-allow-origin" not in (await client.get("/health")).headers


async def test_nobody_is_named_by_default(desk: Any) -> None:
    async with browser(desk) as client:
        assert (await client.options("/v1/models", headers=PREFLIGHT)).status_code == 405
        assert "access-control-allow-origin" not in (await client.get("/health")).headers


@pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/", "https://app.example.com/path", "ftp://x", ""])
def test_what_is_no_origin_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("TESSERA_GATEWAY__CORS_ORIGINS", f'["{origin}"]')
    with pytest.raises(ValidationError, match="cors_origins"):
        GatewaySettings()
