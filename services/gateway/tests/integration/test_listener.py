"""A gateway as a developer may run it: TLS by itself, and no keys."""

import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tessera.local.certificates import Authority
from tessera.testkit import ServiceProcess, Stack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def encrypted(gateway: Any, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServiceProcess, httpx.Client]]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.create()
    own = authority.issue("gateway")
    environment = {
        "TESSERA_GATEWAY__TLS__CERTIFICATE_FILE": str(own.certificate_file),
        "TESSERA_GATEWAY__TLS__KEY_FILE": str(own.key_file),
        "TESSERA_GATEWAY__AUTHENTICATION": "off",
        "TESSERA_GATEWAY__DEVELOPMENT_TENANT": "playground",
    }
    with ServiceProcess("gateway", stack, gateway.database, gateway.peer.prefix, environment).running() as process:
        url = process.url.replace("http:", "https:")
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=str(authority.ca_file))) as client:
            yield process, client


def test_it_speaks_tls_and_nothing_else(encrypted: tuple[ServiceProcess, httpx.Client]) -> None:
    process, client = encrypted
    answer = client.get("/health")
    assert (answer.status_code, answer.headers["strict-transport-security"]) == (200, "max-age=31536000")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{process.url}/health")


def test_without_a_key_it_is_the_development_tenants_and_that_was_told(
    gateway: Any, encrypted: tuple[ServiceProcess, httpx.Client]
) -> None:
    process, client = encrypted
    item = {"type": "message", "id": "m-1", "conversation_id": "c", "role": "user", "content": "x"}
    assert client.post("/v1/memories", json=item).status_code == 202
    assert client.post("/v1/tenants", json={"id": "more"}).json()["error"]["code"] == "missing_scope"
    with gateway.http() as operator:
        assert "playground" in [tenant["id"] for tenant in operator.get("/v1/tenants").json()["data"]]
    warned = [record for record in process.log_records() if record["level"] == "warning" and "authentication is off" in record["event"]]
    assert [record["tenant_id"] for record in warned] == ["playground"]
