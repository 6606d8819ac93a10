"""Two processes on one port, and the `tessera` command at their door."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tessera.contracts.events import GenerationCompleted, GenerationRequested, Usage
from tessera.testkit import ServiceProcess, Stack, eventually_blocking, http_request

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def neighbour(gateway: Any, stack: Stack) -> Iterator[ServiceProcess]:
    environment = {"TESSERA_GATEWAY__PORT": str(gateway.process.http_port), "TESSERA_GATEWAY__BOOTSTRAP_KEY": gateway.key}
    process = ServiceProcess("gateway", stack, gateway.database, gateway.peer.prefix, environment)
    process.start()
    process.wait_ready()
    yield process
    process.stop()


def served(process: ServiceProcess, request_id: str) -> bool:
    return any(record.get("request_id") == request_id for record in process.log_records())


def test_two_processes_share_the_port(gateway: Any, neighbour: ServiceProcess) -> None:
    asked: set[str] = set()

    def both() -> bool:
        request_id = f"shared-{len(asked)}"
        asked.add(request_id)
        with gateway.http() as client:
            assert client.get("/v1/models", headers={"x-request-id": request_id}).status_code == 200
        return all(any(served(process, each) for each in asked) for process in (gateway.process, neighbour))

    eventually_blocking(both)


def test_a_generation_is_joined_on_whichever_replica(gateway: Any, neighbour: ServiceProcess) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1, source="counted")
    done: dict[str, int] = {}

    def script(heard: Any) -> list[Any]:
        generation = heard.data["generation_id"]
        done[generation] = done.get(generation, 0) + 1
        fields = {"model_id": "local/quote", "finish_reason": "stop", "usage": usage}
        return (
            [GenerationCompleted(generation_id=generation, attempt=1, last_index=-1, text="once", **fields)]
            if done[generation] == 1
            else []
        )

    gateway.peer.on(GenerationRequested, script)
    body = {"model": "local/quote", "messages": [{"role": "user", "content": "x"}]}
    answers, asked = [], []

    def both() -> bool:
        request_id = f"joined-{len(asked)}"
        asked.append(request_id)
        with gateway.http() as client:
            answers.append(client.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "both", "x-request-id": request_id}))
        return all(any(served(process, each) for each in asked) for process in (gateway.process, neighbour))

    eventually_blocking(both, 40)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(done) == 1


def test_a_key_revoked_on_one_replica_opens_nothing_on_the_other_within_five_seconds(gateway: Any, neighbour: ServiceProcess) -> None:
    with gateway.http() as client:
        key = client.post("/v1/keys", json={"name": "soon gone"}).json()
    statuses: list[int] = []

    def use() -> int:
        headers = {"authorization": f"Bearer {key['key']}", "connection": "close"}
        statuses.append(http_request("GET", f"{gateway.process.url}/v1/models", headers=headers).status_code)
        return statuses[-1]

    for _ in range(8):
        assert use() == 200
    with gateway.http() as client:
        client.delete(f"/v1/keys/{key['id']}")
    eventually_blocking(lambda: [use() for _ in range(8)] == [401] * 8, 10)


def test_the_command_works_as_printed(gateway: Any) -> None:
    def tessera(*arguments: str) -> Any:
        environment = {**os.environ, "TESSERA_URL": gateway.process.url, "TESSERA_API_KEY": gateway.key}
        program = str(Path(sys.executable).with_name("tessera"))
        return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=40, check=False)

    assert tessera("tenant", "create", "shop").stdout == "shop: active\n"
    again = tessera("tenant", "create", "shop")
    assert (again.returncode, "409 tenant_exists (id)" in again.stderr) == (1, True)
    key = json.loads(tessera("--json", "key", "create", "--tenant", "shop").stdout)
    assert key["key"].startswith("tsr_test_")
    assert json.loads(tessera("--json", "ingest", "hello").stdout)["data"][0]["status"] == "accepted"
    assert tessera("key", "revoke", key["id"]).returncode == 0
    assert "gateway" in tessera("status").stdout
