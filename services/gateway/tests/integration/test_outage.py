"""What a running gateway's users see while Postgres or Kafka is gone, and afterwards (the table in README.md)."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.gateway.domain import keys
from tessera.local.kafka import Kafka, KafkaLimits, cached_distribution
from tessera.local.ports import free_ports
from tessera.testkit import ServiceProcess, Stack, eventually_blocking, new_database

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PATIENCE = 45.0
ITEM = {"type": "message", "conversation_id": "c", "role": "user", "content": "x"}


@dataclass
class Wire:
    """A TCP wire to a server that can be cut and mended."""

    target: tuple[str, int]
    port: int
    _open: list[socket.socket] = field(default_factory=list)
    _listener: socket.socket | None = None

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        for end in [*([listener] if listener else []), *self._open]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.target)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Exposed:
    """A gateway whose Kafka is its own, and whose Postgres hangs on a wire."""

    process: ServiceProcess
    key: str
    kafka: Kafka
    wire: Wire

    def request(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        return httpx.request(method, self.process.url + path, headers={"authorization": f"Bearer {key or self.key}"}, timeout=40, **options)

    def ready(self) -> dict[str, Any] | None:
        response = httpx.get(f"{self.process.admin_url}/health/ready", timeout=10)
        return {name: entry["status"] for name, entry in response.json()["dependencies"].items()}

    def breaker(self) -> float:
        """What the metrics say about the breaker of publishing."""
        told = httpx.get(f"{self.process.admin_url}/metrics", timeout=10).text
        (line,) = [line for line in told.splitlines() if line.startswith('tessera_breaker_open{dependency="publishing"}')]
        return float(line.rpartition(" ")[2])


@pytest.fixture(scope="module")
def exposed(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    ports = free_ports(("broker", "controller", "wire"))
    folder: Path = tmp_path_factory.mktemp("kafka")
    kafka = Kafka(folder, ports["broker"], ports["controller"], cached_distribution(), KafkaLimits(heap_megabytes=256))
    database = new_database(stack, ["gateway"])
    settings = database.settings("gateway")
    wire = Wire((settings.host, settings.port), ports["wire"])
    key = keys.generate("test").reveal()
    environment = {
        "TESSERA_GATEWAY__BOOTSTRAP_KEY": key,
        "TESSERA__KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "TESSERA_GATEWAY__PUBLISH_TIMEOUT_SECONDS": "2",
        "TESSERA_GATEWAY__POSTGRES__PORT": str(wire.port),
        "TESSERA__POSTGRES__PORT": str(wire.port),
    }
    process = ServiceProcess("gateway", stack, database, "", environment)
    try:
        kafka.start()
        wire.mend()
        kafka.wait_ready()
        asyncio.run(ensure_all(KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, keyed_partitions=4), tenants=["default"]))
        process.start()
        process.wait_ready()
        yield Exposed(process, key, kafka, wire)
    finally:
        process.stop()
        wire.cut()
        database.drop()
        kafka.stop()


def test_without_postgres_known_keys_go_on_a_while_and_the_rest_is_503(exposed: Exposed) -> None:
    stranger = keys.generate("test").reveal()
    assert exposed.request("POST", "/v1/memories", json=ITEM).status_code == 202
    exposed.wire.cut()
    assert exposed.request("POST", "/v1/memories", json=ITEM).status_code == 202
    unknown = exposed.request("GET", "/v1/models", key=stranger)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert unknown.headers["retry-after"]
    eventually_blocking(lambda: exposed.request("GET", "/v1/models").status_code == 503, PATIENCE)
    eventually_blocking(lambda: (exposed.ready() or {}).get("postgres") == "down", PATIENCE)
    exposed.wire.mend()
    eventually_blocking(lambda: exposed.request("GET", "/v1/tenants").status_code == 200, PATIENCE)
    eventually_blocking(lambda: (exposed.ready() or {}).get("postgres") == "up", PATIENCE)


def test_without_kafka_nothing_is_accepted_and_afterwards_all_goes_on(exposed: Exposed) -> None:
    assert exposed.request("POST", "/v1/memories", json=ITEM).status_code == 202
    exposed.kafka.kill()
    refused = exposed.request("POST", "/v1/memories", json=ITEM)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert refused.headers["retry-after"]
    assert "not known" in refused.json()["error"]["message"]
    batch = exposed.request("POST", "/v1/memories/batch", json={"items": [ITEM] * 5})
    assert batch.status_code == 503
    at_once = exposed.request("POST", "/v1/memories", json=ITEM)
    assert (at_once.status_code, at_once.elapsed.total_seconds() < 2) == (503, True)
    assert "Nothing was done" in at_once.json()["error"]["message"]
    eventually_blocking(lambda: (exposed.ready() or {}).get("publishing") == "down" and exposed.breaker() == 1.0, PATIENCE)
    letters = exposed.request("GET", "/v1/dead-letters")
    assert (letters.status_code, letters.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert exposed.request("GET", "/v1/tenants").status_code == 200
    exposed.kafka.start()
    exposed.kafka.wait_ready()
    eventually_blocking(lambda: exposed.request("POST", "/v1/memories", json=ITEM).status_code == 202, PATIENCE)
    eventually_blocking(lambda: exposed.ready() is not None and exposed.breaker() == 0.0, PATIENCE)
    assert exposed.request("GET", "/v1/dead-letters").status_code == 200
