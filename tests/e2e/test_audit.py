"""From an act at the gateway to the answer of who did it."""

from datetime import timedelta
from typing import Any

import pytest

from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PATIENCE = timedelta(seconds=30)


def _trail(platform: Platform, key: str = "", **query: str | int) -> list[dict[str, Any]]:
    answer = platform.request("GET", "/v1/audit", key=key, params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def _new_key(platform: Platform, tenant: str, *scopes: str) -> dict[str, Any]:
    answer = platform.request("POST", "/v1/keys", json={"tenant_id": tenant, "name": "audited", "scopes": list(scopes)})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_who_did_what_is_told_to_whom_it_concerns(platform: Platform) -> None:
    for tenant in ("audited", "unaudited"):
        platform.tenant(tenant)
    mine, strangers = (_new_key(platform, tenant, "audit") for tenant in ("audited", "unaudited"))
    officer = _new_key(platform, "audited", "retention")
    platform.request("PUT", "/v1/retention/policy", key=officer["key"], json={"max_age_days": 3650}).raise_for_status()
    platform.request("DELETE", f"/v1/keys/{officer['id']}").raise_for_status()

    def of_officer() -> list[dict[str, Any]]:
        found = _trail(platform, mine["key"], target=officer["id"])
        assert [event["action"] for event in found] == ["key.revoke", "key.create"]
        return found

    revoked, created = eventually_blocking(of_officer, PATIENCE)
    assert (created["details"], created["outcome"]) == ({"scopes": "retention"}, "succeeded")
    assert (revoked["actor"]["kind"], revoked["actor"]["tenant_id"], revoked["client_address"]) == ("key", "default", None)

    def of_policy() -> list[dict[str, Any]]:
        found = _trail(platform, mine["key"], actor=officer["id"], action="policy.set")
        assert [event["outcome"] for event in found] == ["succeeded", "attempted"]
        return found

    assert {event["client_address"] for event in eventually_blocking(of_policy, PATIENCE)} == {"127.0.0.1"}
    operators = eventually_blocking(lambda: _trail(platform, target=officer["id"], tenant_id="audited"), PATIENCE)
    assert {event["client_address"] for event in operators} == {"127.0.0.1"}
    assert _trail(platform, strangers["key"], target=officer["id"]) == []
    assert platform.request("GET", "/v1/audit", key=strangers["key"], params={"tenant_id": "audited"}).status_code == 403
    assert {event["tenant_id"] for event in _trail(platform, strangers["key"], limit=100)} == {"unaudited"}


def test_pages_are_followed_to_the_end(platform: Platform) -> None:
    platform.tenant("paged-audit")
    made = [_new_key(platform, "paged-audit", "inference")["id"] for _ in range(4)]
    eventually_blocking(lambda: {event["target"]["id"] for event in _trail(platform, tenant_id="paged-audit")} >= set(made), PATIENCE)
    whole = [event["id"] for event in _trail(platform, tenant_id="paged-audit")]
    seen: list[str] = []
    query: dict[str, Any] = {"tenant_id": "paged-audit", "limit": 2}
    while True:
        page = platform.request("GET", "/v1/audit", params=query).json()
        seen += [event["id"] for event in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next_cursor"]
    assert seen == whole
    wrong = platform.request("GET", "/v1/audit", params={"after": "nothing"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "after")
