"""An event that came before its tenant: kept, shown, replayed when the tenant is there, and applied once."""

import base64
import json
import os
import subprocess
import sys
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from kafka_records import produce, read_all

from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PATIENCE = timedelta(seconds=60)


def _tessera(platform: Platform, *arguments: str) -> Any:
    """What the command prints as JSON."""
    command = [str(Path(sys.executable).with_name("tessera")), "--json", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **platform.client_environment()}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_an_event_that_came_before_its_tenant_is_applied_once_when_it_is_replayed(platform: Platform) -> None:
    tenant, event_id, conversation = f"late-{uuid.uuid4().hex[:8]}", str(uuid.uuid4()), f"late-{uuid.uuid4()}"
    value = json.dumps({"conversation_id": conversation, "role": "user", "content": "The lamp is lit."}).encode()
    attributes = {"specversion": "1.0", "id": event_id, "source": "/late", "type": "tessera.message.published.v1", "tenantid": tenant}
    headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
    produce(platform, "ingest", value, headers, conversation.encode())

    def listed(*options: str) -> list[dict[str, Any]]:
        return list(_tessera(platform, "dead-letter", "list", "--event", event_id, *options)["data"])

    (letter,) = eventually_blocking(listed, PATIENCE)
    assert (letter["code"], letter["tenant_id"], letter["topic"], letter["service"]) == ("tenant_unknown", tenant, "ingest", "memory")
    shown = _tessera(platform, "dead-letter", "show", letter["id"])
    assert base64.b64decode(shown["value"]["base64"]) == value
    assert [(header["name"], header["text"].encode()) for header in shown["headers"]] == headers

    key = platform.tenant(tenant)
    (dry,) = _tessera(platform, "dead-letter", "replay", "--tenant", tenant, "--dry-run")["data"]
    (done,) = _tessera(platform, "dead-letter", "replay", "--tenant", tenant)["data"]
    (again,) = _tessera(platform, "dead-letter", "replay", letter["id"])["data"]
    assert [one["result"] for one in (dry, done, again)] == ["would_be_replayed", "replayed", "already_replayed"]
    assert listed() == []

    def state(name: str) -> str:
        return str(platform.request("GET", f"/v1/ingest/{name}", key=key).json()["status"])

    eventually_blocking(lambda: state(event_id) == "searchable", PATIENCE)
    # A replay that nobody remembers, such as before a crash, is the same record once more.
    produce(platform, "ingest", value, headers, conversation.encode())
    behind_id = f"behind-{event_id}"
    behind = [(name, behind_id.encode() if name == "ce_id" else value) for name, value in headers]
    produce(platform, "ingest", value, behind, conversation.encode())
    eventually_blocking(lambda: state(behind_id) == "searchable", PATIENCE)
    origins = [json.loads(record.value or b"null")["origin_id"] for record in read_all(platform, "memory.recorded")]
    assert (origins.count(event_id), origins.count(behind_id)) == (1, 1)


def test_waiting_events_are_counted_per_consumer(platform: Platform) -> None:
    rows = {(row["service"], row["consumer"]) for row in _tessera(platform, "lag")["data"]}
    assert {("memory", "ingestion"), ("memory", "chat"), ("retention", "bulk")} <= rows
