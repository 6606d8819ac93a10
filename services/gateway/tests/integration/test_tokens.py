"""Access tokens of a real OpenID provider over HTTP, on a real gateway; and whatever else is presented."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tessera.testkit import eventually_blocking, http_request
from tessera.testkit.issuer import signing_key

pytestmark = pytest.mark.integration

PATIENCE = 60.0


@pytest.fixture(autouse=True)
def settled(gateway: Any) -> Iterator[None]:
    """Each test begins with an issuer that is there."""
    gateway.issuer_wire.mend()
    eventually_blocking(lambda: issuer_of(gateway) == ("up", "closed"), PATIENCE)
    yield
    gateway.issuer_wire.mend()


def issuer_of(gateway: Any) -> tuple[str, str]:
    """Status and breaker, as the health report tells them."""
    report = http_request("GET", f"{gateway.process.admin_url}/health/ready", timeout=10).json()
    found = report["dependencies"]["issuer"]
    return found["status"], found["breaker"]


def models(gateway: Any, credential: str) -> httpx.Response:
    return http_request("GET", f"{gateway.process.url}/v1/models", headers={"authorization": f"Bearer {credential}"}, timeout=30)


def test_a_token_opens_what_it_says_for_its_tenant(gateway: Any) -> None:
    with gateway.openai(key=gateway.issuer.token(scope="openid inference memory:write")) as client:
        assert client.models.list().data
    with gateway.http(key=gateway.issuer.token(scope="admin", roles=["operator"])) as operator:
        assert operator.post("/v1/tenants", json={"id": "with-tokens"}).status_code == 201
        assert operator.get("/v1/models").status_code == 403
    assert models(gateway, gateway.issuer.token(scope="admin inference", tenant="with-tokens")).status_code == 200
    with gateway.http(key=gateway.issuer.token(scope="admin inference")) as holder:
        assert holder.get("/v1/tenants").status_code == 403


def test_the_log_knows_the_tenant_and_the_credential_and_neither_token_nor_name(gateway: Any) -> None:
    token = gateway.issuer.token(scope="inference", sub="ada.lovelace@example.com")
    http_request(
        "GET", f"{gateway.process.url}/v1/models", headers={"authorization": f"Bearer {token}", "x-request-id": "by-token"}, timeout=30
    )
    records = eventually_blocking(
        lambda: [record for record in gateway.process.log_records() if record.get("request_id") == "by-token" and "status" in record]
    )
    assert (records[0]["status"], records[0]["tenant_id"], records[0]["key_id"][:5]) == (200, "default", "oidc:")
    written = gateway.process.log.read_text()
    assert token not in written
    assert "ada.lovelace" not in written


def test_a_refusal_is_one_answer_and_says_in_the_log_what_was_looked_at(gateway: Any) -> None:
    refused = [
        models(gateway, gateway.issuer.token(**claims))
        for claims in ({"aud": "other"}, {"tenant": "nobody"}, {"tenant": None}, {"nbf": 2**33})
    ]
    assert {(answer.status_code, answer.text) for answer in refused} == {(401, refused[0].text)}
    assert refused[0].headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert models(gateway, gateway.issuer.token(exp=1)).json()["error"]["code"] == "token_expired"
    reasons = {record.get("reason") for record in gateway.process.log_records() if record.get("event") == "token_refused"}
    assert reasons >= {"InvalidAudienceError", "tenant is not active", "tenant", "ImmatureSignatureError", "expired"}


def test_a_key_is_rotated_without_a_restart(gateway: Any) -> None:
    issuer, before = gateway.issuer, gateway.issuer.token(scope="inference")
    issuer.rotate(signing_key("second"), keep=issuer.keys)
    assert eventually_blocking(lambda: models(gateway, issuer.token(scope="inference")).status_code == 200)
    assert models(gateway, before).status_code == 200
    issuer.rotate(issuer.keys[-1])
    eventually_blocking(lambda: models(gateway, before).status_code == 401)
    assert models(gateway, issuer.token(scope="inference")).status_code == 200


def test_without_the_issuer_known_keys_go_on_and_afterwards_new_ones_are_taken(gateway: Any) -> None:
    issuer, known = gateway.issuer, gateway.issuer.token(scope="inference")
    assert models(gateway, known).status_code == 200
    gateway.issuer_wire.cut()
    issuer.rotate(signing_key("made while nobody could see it"), keep=issuer.keys)
    unknown = issuer.token(scope="inference")
    refused = eventually_blocking(lambda: _unless(401, models(gateway, unknown)))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert refused.headers["retry-after"]
    eventually_blocking(lambda: issuer_of(gateway)[0] == "down" and breaker(gateway) > 0, PATIENCE)
    assert [models(gateway, credential).status_code for credential in (known, gateway.key)] == [200, 200]
    assert httpx.get(f"{gateway.process.url}/health").json() == {"status": "degraded"}
    gateway.issuer_wire.mend()
    eventually_blocking(lambda: models(gateway, unknown).status_code == 200, PATIENCE)
    eventually_blocking(lambda: issuer_of(gateway) == ("up", "closed") and breaker(gateway) == 0.0, PATIENCE)


def _unless(status: int, answer: httpx.Response) -> httpx.Response | None:
    """A moment after it was asked, the issuer is not asked again."""
    return None if answer.status_code == status else answer


def breaker(gateway: Any) -> float:
    told = http_request("GET", f"{gateway.process.admin_url}/metrics", timeout=10).text
    (line,) = [line for line in told.splitlines() if line.startswith('tessera_breaker_open{dependency="issuer"}')]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("line", "statuses"),
    [
        (b"Authorization: Bearer a b  c\xff\xfe", {401}),
        (b"Authorization: Bearer tsr_test_\xc3\xa4\xf0\x9f\x98\x80", {401}),
        (b"Authorization: Bearer " + b"\x7f\t\x80", {400, 401}),
        (b"Authorization: Bearer tsr_test_\x00", {400, 401}),
        (b"Authorization:", {401}),
        (b"Authorization: Bearer", {401}),
        (b"Authorization: Bearer tsr_" + b"0" * 60_000, {401}),
        (b"Authorization: Bearer e." + b"e" * 500_000, {401, 431}),
        (b"Authorization: Bearer a\r\nAuthorization: Bearer b", {401}),
        (b"X-Request-ID: \xff \x01", {400, 401}),
    ],
)
def test_no_header_is_a_500(gateway: Any, line: bytes, statuses: set[int]) -> None:
    host, port = gateway.process.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + line + b"\r\n\r\n")
        answer = b""
        while more := connection.recv(65_536):
            answer += more
    assert int(answer.split(b" ")[1]) in statuses, answer[:300]
