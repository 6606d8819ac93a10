"""Keys, tenants and the errors around every request, on a real gateway."""

import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest

from tessera.contracts.events import TenantChanged
from tessera.gateway.domain import keys
from tessera.testkit import eventually_blocking

pytestmark = pytest.mark.integration

FOUR = {"message", "type", "param", "code"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, whole."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == FOUR
    error: dict[str, Any] = body["error"]
    return error


def new_key(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/keys", json=body)
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


@pytest.mark.parametrize(
    "authorization",
    ["Bearer nonsense", "Basic abc", "Bearer tsr_test_a b_ü", "Bearer " + keys.generate("test").reveal(), "Bearer " + "x" * 5000],
    ids=["no key", "other scheme", "odd characters", "unknown key", "too long"],
)
def test_a_key_that_opens_nothing_is_401(gateway: Any, authorization: str) -> None:
    response = httpx.get(f"{gateway.process.url}/v1/models", headers={"authorization": authorization.encode("latin-1")})
    assert response.status_code == 401
    assert error_of(response)["code"] in {"invalid_api_key", "missing_api_key"}


def test_the_sdk_understands_a_wrong_key(gateway: Any) -> None:
    with gateway.openai(key="wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"


def test_a_second_tenant_gets_topics_an_event_and_keys_of_its_own(gateway: Any) -> None:
    with gateway.http() as client:
        made = client.post("/v1/tenants", json={"id": "acme", "name": "Acme Ltd"})
        assert (made.status_code, made.json()["status"]) == (201, "active")
        again = client.post("/v1/tenants", json={"id": "acme"})
        assert (again.status_code, error_of(again)["code"], error_of(again)["param"]) == (409, "tenant_exists", "id")
        key = new_key(client, tenant_id="acme", name="shop", scopes=["inference", "memory:write"])
        listed = client.get("/v1/keys", params={"tenant_id": "acme"}).json()
        tenants = [tenant["id"] for tenant in client.get("/v1/tenants").json()["data"]]
    assert [entry["id"] for entry in listed["data"]] == [key["id"]]
    assert "key" not in listed["data"][0]
    assert {"acme", "default"} <= set(tenants)
    told = eventually_blocking(lambda: [said for said in gateway.peer.of(TenantChanged) if said.data["tenant"] == "acme"])
    assert told[0].key == b"acme"
    with gateway.http(key=key["key"]) as client:
        assert client.get("/v1/models").status_code == 200
        message = {"type": "message", "conversation_id": "c", "role": "user", "content": "hi"}
        assert client.post("/v1/memories", json=message).status_code == 202
        refused = client.get("/v1/tenants")
        assert (refused.status_code, error_of(refused)["code"]) == (403, "missing_scope")


def test_a_key_is_rotated_and_the_secret_before_lives_on_for_its_grace(gateway: Any) -> None:
    def opens(text: str) -> bool:
        with gateway.http(key=text) as client:
            return bool(client.get("/v1/models").status_code == 200)

    with gateway.http() as operator:
        first = new_key(operator, name="long-lived", scopes=["inference"])
        second = operator.post(f"/v1/keys/{first['id']}/rotate").raise_for_status().json()
        assert (second["id"], second["scopes"]) == (first["id"], ["inference"])
        assert datetime.fromisoformat(second["former_until"]) > datetime.now(UTC) + timedelta(hours=23)
        assert [opens(key["key"]) for key in (first, second)] == [True, True]
        third = operator.post(f"/v1/keys/{first['id']}/rotate", json={"grace_seconds": 1}).raise_for_status().json()
        assert [opens(key["key"]) for key in (first, third)] == [False, True]
        eventually_blocking(lambda: not opens(second["key"]))
        assert opens(third["key"])
        operator.delete(f"/v1/keys/{first['id']}").raise_for_status()
        revoked = operator.post(f"/v1/keys/{first['id']}/rotate")
        assert (revoked.status_code, error_of(revoked)["code"]) == (404, "key_not_found")
        assert not opens(third["key"])


def test_the_last_use_of_a_key_is_known(gateway: Any) -> None:
    began = datetime.now(UTC)
    with gateway.http() as operator:
        key = new_key(operator, name="watched", scopes=["inference"])

        def last_used() -> Any:
            (found,) = [entry for entry in _keys(operator) if entry["id"] == key["id"]]
            return found["last_used_at"]

        assert last_used() is None
        with gateway.http(key=key["key"]) as holder:
            assert holder.get("/v1/models").status_code == 200
        assert datetime.fromisoformat(eventually_blocking(last_used)) >= began


def _keys(operator: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = operator.get("/v1/keys", params={"limit": 200, **({"after": after} if after else {})}).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        after = page["next_cursor"]


def test_a_revoked_key_and_an_expired_key_open_nothing(gateway: Any) -> None:
    with gateway.http() as client:
        revoked = new_key(client, name="short-lived")
        soon = datetime.now(UTC) + timedelta(seconds=1)
        expiring = new_key(client, name="expiring", expires_at=soon.isoformat())
        with gateway.http(key=revoked["key"]) as holder:
            assert holder.get("/v1/models").status_code == 200
            assert client.delete(f"/v1/keys/{revoked['id']}").status_code == 204
            assert holder.get("/v1/models").status_code == 401
        with gateway.http(key=expiring["key"]) as holder:
            eventually_blocking(lambda: holder.get("/v1/models").status_code == 401)
        missing = client.delete("/v1/keys/none")
        states = {entry["id"]: entry["status"] for entry in client.get("/v1/keys", params={"limit": 200}).json()["data"]}
    assert (missing.status_code, error_of(missing)["code"]) == (404, "key_not_found")
    assert (states[revoked["id"]], states[expiring["id"]]) == ("revoked", "expired")


def test_keys_and_tenants_are_paged(gateway: Any) -> None:
    with gateway.http() as client:
        for number in range(3):
            client.post("/v1/tenants", json={"id": f"paged-{number}"})
            new_key(client, tenant_id="paged-0", name=f"key {number}")
        first = client.get("/v1/keys", params={"tenant_id": "paged-0", "limit": 2}).json()
        rest = client.get("/v1/keys", params={"tenant_id": "paged-0", "limit": 2, "after": first["next_cursor"]}).json()
        tenants = client.get("/v1/tenants", params={"limit": 1}).json()
    assert (len(first["data"]), first["has_more"], len(rest["data"]), rest["has_more"]) == (2, True, 1, False)
    assert tenants["has_more"]
    assert tenants["next_cursor"] == tenants["data"][0]["id"]


def test_a_key_for_a_tenant_that_does_not_exist(gateway: Any) -> None:
    with gateway.http() as client:
        response = client.post("/v1/keys", json={"tenant_id": "nobody", "name": "x"})
    assert (response.status_code, error_of(response)["code"]) == (404, "tenant_not_found")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "unknown_url"),
        ("GET", "/", None, 404, "unknown_url"),
        ("DELETE", "/v1/chat/completions", None, 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[]", 400, "invalid_type"),
        ("POST", "/v1/chat/completions", b"x" * (1024 * 1024 + 1), 413, "request_too_large"),
        ("GET", "/v1/models/none", None, 404, "model_not_found"),
        ("GET", "/v1/keys?limit=0", None, 400, "integer_below_min_value"),
    ],
)
def test_every_refusal_is_the_error_object_with_a_request_id(
    gateway: Any, method: str, path: str, content: bytes | None, *, status: int, code: str
) -> None:
    with gateway.http() as client:
        response = client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "server" not in response.headers


def test_a_body_that_grows_beyond_the_limit_without_saying_so_is_413(gateway: Any) -> None:
    with gateway.http() as client:
        response = client.post(
            "/v1/chat/completions", content=(b"x" * 65536 for _ in range(17)), headers={"content-type": "application/json"}
        )
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


def test_a_body_that_does_not_come_is_408(gateway: Any) -> None:
    host, port = gateway.process.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\nContent-Length: 10\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        answer = _until(connection, "}}").decode()
    assert answer.startswith("HTTP/1.1 408")
    assert '"code":"request_timeout"' in answer


def _until(connection: socket.socket, end: str) -> bytes:
    """What was received when it ends so; head and body may come apart."""
    received = b""
    while not received.endswith(end.encode()) and (more := connection.recv(65536)):
        received += more
    return received


def test_a_sane_request_id_is_kept_and_another_replaced(gateway: Any) -> None:
    with gateway.http() as client:
        assert client.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        assert client.get("/v1/models", headers={"x-request-id": "no spaces!"}).headers["x-request-id"].startswith("req_")


def test_the_request_id_is_in_the_log_with_the_tenant_and_never_the_key(gateway: Any) -> None:
    with gateway.http() as client:
        client.get("/v1/models", headers={"x-request-id": "find-me-in-the-log"})
    records = eventually_blocking(
        lambda: [
            record for record in gateway.process.log_records() if record.get("request_id") == "find-me-in-the-log" and "status" in record
        ]
    )
    assert records[0]["tenant_id"] == "default"
    assert records[0]["status"] == 200
    assert gateway.key not in gateway.process.log.read_text()


def test_status_and_health(gateway: Any) -> None:
    with gateway.http() as client:
        status = eventually_blocking(lambda: _gateway_status(client))
    assert status["status"] == "ready"
    assert {dependency["name"] for dependency in status["replicas"][0]["dependencies"]} >= {"kafka", "postgres"}
    assert httpx.get(f"{gateway.process.url}/health").json() == {"status": "ready"}


def _gateway_status(client: httpx.Client) -> dict[str, Any] | None:
    body = client.get("/v1/status").json()
    assert body["services"][0]["service"] == "gateway"
    assert body["status"] == "unavailable"  # five services are not running here
    return next((service for service in body["services"] if service["service"] == "gateway" and service["status"] == "ready"), None)
