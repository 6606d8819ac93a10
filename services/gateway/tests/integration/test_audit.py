"""The record of an act, on a real gateway: it commits with the act, and goes to the log by the outbox."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tessera.bus import Bus, outbox
from tessera.contracts import aggregate_key
from tessera.contracts.events import AuditRecorded
from tessera.gateway.adapters.postgres import PostgresTenants
from tessera.gateway.domain import keys
from tessera.gateway.domain.audit import BOOTSTRAP, Actor
from tessera.gateway.ports import KeyDescription
from tessera.gateway.settings import GatewaySettings
from tessera.storage import Database
from tessera.testkit import eventually_blocking

pytestmark = pytest.mark.integration

NOW = datetime(2026, 11, 20, tzinfo=UTC)


def told(gateway: Any, target: str) -> list[Any]:
    return [heard for heard in gateway.peer.of(AuditRecorded) if (heard.data.get("target") or {}).get("id") == target]


def test_the_life_of_a_key_is_on_record_and_its_secrets_are_not(gateway: Any) -> None:
    operator = keys.parse(gateway.key)
    assert operator is not None
    with gateway.http() as client:
        made = client.post("/v1/keys", json={"name": "n", "scopes": ["inference"]}, headers={"x-request-id": "req-audit"}).json()
        rotated = client.post(f"/v1/keys/{made['id']}/rotate").json()
        client.delete(f"/v1/keys/{made['id']}").raise_for_status()
        client.delete("/v1/keys/none")
    heard = eventually_blocking(lambda: found if len(found := told(gateway, made["id"])) == 3 else None)
    assert [(one.data["action"], one.data["outcome"]) for one in heard] == [
        ("key.create", "succeeded"),
        ("key.rotate", "succeeded"),
        ("key.revoke", "succeeded"),
    ]
    assert {one.key for one in heard} == {aggregate_key("default", "audit", "")}
    assert {(one.attributes["tenantid"], one.data["tenant"]) for one in heard} == {("default", "default")}
    assert heard[0].data["actor"] == {"kind": "key", "id": operator.id, "tenant": "default"}
    assert heard[0].data["details"] == [{"name": "scopes", "value": "inference"}]
    assert (heard[0].attributes["requestid"], heard[0].data["request_id"], heard[0].data["client_address"]) == (
        "req-audit",
        "req-audit",
        "127.0.0.1",
    )
    secrets = [parsed.secret for text_ in (made["key"], rotated["key"]) if (parsed := keys.parse(text_))]
    assert len(secrets) == 2
    assert not [one for one in heard for secret in secrets if secret in str(one)]
    assert told(gateway, "none") == []


def test_a_command_is_announced_before_it_is_in_the_log(gateway: Any) -> None:
    with gateway.http() as client:
        client.post("/v1/services/validator/control", json={"action": "resume", "consumer": "bulk"}).raise_for_status()
        client.post("/v1/services/nobody/control", json={"action": "resume"})
    for target, outcomes in (("validator", ["attempted", "succeeded"]), ("nobody", ["attempted", "refused"])):
        heard = eventually_blocking(lambda: found if len(found := told(gateway, target)) >= 2 else None)  # noqa: B023
        assert [one.data["outcome"] for one in heard] == outcomes
        assert {one.attributes["tenantid"] for one in heard} == {"platform"}


@dataclass(frozen=True)
class Apart:
    """The gateway's database, written by somebody else in this process."""

    database: Database
    tenants: PostgresTenants

    async def key(self, key_id: str) -> Any:
        async with self.database.transaction() as connection:
            return (await connection.execute(text("SELECT * FROM api_keys WHERE id = :id"), {"id": key_id})).one_or_none()


@pytest.fixture
async def apart(gateway: Any) -> AsyncIterator[Apart]:
    postgres = gateway.database.settings("gateway")
    settings = GatewaySettings.model_validate({"profile": "test", "postgres": postgres.model_dump()})
    database = Database("gateway", postgres)
    bus = Bus(settings, database, on_fatal=lambda error: pytest.fail(str(error)))
    yield Apart(database, PostgresTenants(database, bus))
    await database.close()


def new_key() -> KeyDescription:
    return KeyDescription("default", keys.generate("test").id, "n", "test", ("inference",), NOW, None, None)


async def test_neither_act_nor_record_without_the_other(apart: Apart, gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known, never = new_key(), new_key()
    by = Actor("key", "k", "default")
    assert await apart.tenants.add_key(known, b"d" * 32, by)

    async def fail(*_: Any) -> None:
        raise ConnectionResetError("no record can be written")

    monkeypatch.setattr(outbox, "write", fail)
    for act in (
        apart.tenants.add_key(never, b"d" * 32, by),
        apart.tenants.rotate_key(known.id, b"e" * 32, NOW, NOW + timedelta(days=1), by),
        apart.tenants.revoke_key(known.id, NOW, by),
    ):
        with pytest.raises(ConnectionResetError):
            await act
    assert await apart.key(never.id) is None
    row = await apart.key(known.id)
    assert (bytes(row.digest), row.former_digest, row.revoked_at) == (b"d" * 32, None, None)


async def test_the_bootstrap_key_is_on_record_once(apart: Apart, gateway: Any) -> None:
    """Every replica makes it at every start."""
    key = new_key()
    assert [await apart.tenants.add_key(key, b"d" * 32, BOOTSTRAP) for _ in range(2)] == [True, False]
    assert await apart.tenants.add_key(key, b"e" * 32, BOOTSTRAP)  # another pepper
    assert bytes((await apart.key(key.id)).digest) == b"e" * 32
