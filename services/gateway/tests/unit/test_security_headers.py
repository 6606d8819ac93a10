"""What every answer says to browsers and caches, whoever gives it: a route, a refusal, the edge, or nobody's fault."""

from typing import Any

import pytest

from tessera.gateway.routes.edge import EdgeLimits

pytestmark = pytest.mark.unit

EXPECTED = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", "/health", None, 200),
        ("GET", "/openapi.json", None, 200),
        ("DELETE", "/v1/keys/none", None, 404),
        ("GET", "/nowhere", None, 404),
        ("PATCH", "/v1/models", None, 405),
        ("POST", "/v1/tokenize", b"{}", 400),
        ("POST", "/v1/tokenize", b"x" * 1_001, 413),
        ("POST", "/v1/memories/search", b'{"query": "x"}', 500),
    ],
)
async def test_every_answer_has_them(desk: Any, method: str, path: str, content: bytes | None, status: int) -> None:
    desk.log.answers = [RuntimeError("what nobody foresaw")]
    async with desk.client(limits=EdgeLimits(body_bytes=1_000)) as client:
        answer = await client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in EXPECTED} == EXPECTED


async def test_a_refused_key_has_them(desk: Any) -> None:
    async with desk.client("nonsense") as client:
        answer = await client.get("/v1/models")
    assert answer.status_code == 401
    assert {name: answer.headers.get(name) for name in EXPECTED} == EXPECTED
