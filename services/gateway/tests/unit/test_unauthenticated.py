"""Development without keys."""

import dataclasses
from typing import Any

import pytest

from tessera.contracts.events import RecallCompleted
from tessera.gateway.handlers.unauthenticated import Unauthenticated, make_tenant

pytestmark = pytest.mark.unit


async def test_everybody_is_the_development_tenant_and_nobody_an_operator(desk: Any) -> None:
    desk.rooms = dataclasses.replace(desk.rooms, authenticator=Unauthenticated(desk.store, b"pepper", "playground"))
    desk.log.answers += [RecallCompleted(memories=())] * 3
    operator = desk.new_key("admin", tenant_id="other")
    async with desk.client() as client:
        for shown in ({"authorization": ""}, {"authorization": "Bearer sk-anything"}, {"authorization": f"Bearer {operator}"}):
            assert (await client.post("/v1/memories/search", json={"query": "x"}, headers=shown)).status_code == 200
            refused = await client.get("/v1/status", headers=shown)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
        item = {"type": "message", "conversation_id": "c", "role": "user", "content": "x"}
        assert (await client.post("/v1/memories", json=item)).status_code == 202
    assert desk.log.sent[0].tenant_id == "playground"
    assert desk.store.looked_up == 0


async def test_the_tenant_is_made_once(desk: Any) -> None:
    await make_tenant(desk.store, "playground")
    first = desk.store.tenants["playground"]
    await make_tenant(desk.store, "playground")
    assert desk.store.tenants == {"playground": first}
