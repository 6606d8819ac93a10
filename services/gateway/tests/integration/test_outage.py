"""What a gateway's users see while something that it needs is gone, and afterwards (the table in README.md)."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import ensure_all
from tessera.contracts.events import ModelDeclared, ModelReference
from tessera.gateway.domain import keys
from tessera.local.kafka import Kafka, KafkaLimits, cached_distribution
from tessera.local.ports import free_ports
from tessera.testkit import CloudEventProducer, ServiceProcess, Stack, Wire, eventually_blocking, http_request, new_database
from tessera.testkit.kafka import CopiedKafka

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PATIENCE = 120.0
ITEM = {"type": "message", "conversation_id": "c", "role": "user", "content": "x"}


@dataclass(frozen=True)
class Exposed:
    """A gateway whose Kafka is its own, and whose Postgres and Redis hang on wires."""

    process: ServiceProcess
    key: str
    kafka: Kafka
    wire: Wire
    redis_wire: Wire
    folder: Path
    """Holds the folders of the object store and of the spool."""

    def request(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        return http_request(method, self.process.url + path, headers={"authorization": f"Bearer {key or self.key}"}, timeout=40, **options)

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = http_request("GET", f"{self.process.admin_url}/health/ready", timeout=10).json()
        return answer

    def ready(self) -> dict[str, str]:
        return {name: entry["status"] for name, entry in self.health()["dependencies"].items()}

    def breaker(self, dependency: str = "publishing") -> float:
        """What the metrics say about a breaker."""
        told = http_request("GET", f"{self.process.admin_url}/metrics", timeout=10).text
        (line,) = [line for line in told.splitlines() if line.startswith(f'tessera_breaker_open{{dependency="{dependency}"}}')]
        return float(line.rpartition(" ")[2])

    def remember(self, content: str = "x") -> httpx.Response:
        return self.request("POST", "/v1/memories", json={**ITEM, "content": content})

    def start_kafka(self) -> None:
        """May be called while it runs."""
        if self.kafka.pid is None:
            self.kafka.start()
        self.kafka.wait_ready()

    def is_open(self) -> bool:
        """Whether it takes requests: a few seconds after its start where Kafka is away."""
        try:
            return bool(self.request("GET", "/health").status_code)
        except httpx.ConnectError:
            return False

    def serves(self) -> None:
        """Waits until it is as it was before any outage."""
        eventually_blocking(lambda: self.remember().json().get("status") == "accepted", PATIENCE)
        eventually_blocking(lambda: self.health()["status"] == "ready", PATIENCE)

    @contextmanager
    def restarted(self, **environment: str) -> Iterator[None]:
        """Inside, the gateway was started with these variables while Kafka was away; afterwards it has them no more, and Kafka is back."""
        self.process.stop()
        self.kafka.kill()
        self.process.override(**environment)
        try:
            self.process.start()
            eventually_blocking(self.is_open, PATIENCE)
            yield
        finally:
            self.start_kafka()
            if environment:
                self.process.stop()
                self.process.override(**dict.fromkeys(environment, ""))
                self.process.start()
                self.process.wait_ready()

    def live(self) -> bool:
        """Whether it is there at all."""
        try:
            return http_request("GET", f"{self.process.admin_url}/health/live", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def exposed(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    ports = free_ports(("broker", "controller"))
    folder: Path = tmp_path_factory.mktemp("exposed")
    kafka = CopiedKafka(folder / "kafka", ports["broker"], ports["controller"], cached_distribution(), KafkaLimits(heap_megabytes=256))
    database = new_database(stack, ["gateway"])
    redis_port = urlsplit(stack.redis_url).port or 0
    wire, redis_wire = Wire(database.settings("gateway").port), Wire(redis_port)
    key = keys.generate("test").reveal()
    environment = {
        "TESSERA_GATEWAY__BOOTSTRAP_KEY": key,
        "TESSERA__KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "TESSERA_GATEWAY__PUBLISH_TIMEOUT_SECONDS": "2",
        "TESSERA_GATEWAY__QUESTION_TIMEOUT_SECONDS": "2",
        "TESSERA_GATEWAY__GENERATION_TIMEOUT_SECONDS": "6",
        "TESSERA__OBJECTS__URL": (folder / "objects").as_uri(),
        "TESSERA__OBJECTS__BREAKER_RESET_SECONDS": "1",
        "TESSERA_GATEWAY__POSTGRES__PORT": str(wire.port),
        "TESSERA__POSTGRES__PORT": str(wire.port),
        "TESSERA__REDIS__URL": stack.redis_url.replace(f":{redis_port}", f":{redis_wire.port}"),
        "TESSERA_GATEWAY__LIMITS__KEY__REQUESTS_PER_MINUTE": "100000",
    }
    process = ServiceProcess("gateway", stack, database, "", environment)
    try:
        kafka.start()
        kafka.wait_ready()
        asyncio.run(ensure_all(KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, keyed_partitions=4), tenants=["default"]))
        process.start()
        process.wait_ready()
        yield Exposed(process, key, kafka, wire, redis_wire, folder)
    finally:
        process.stop()
        wire.cut()
        redis_wire.cut()
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
    eventually_blocking(lambda: exposed.ready().get("postgres") == "down" and exposed.breaker("postgres") == 1.0, PATIENCE)
    exposed.wire.mend()
    eventually_blocking(lambda: exposed.request("GET", "/v1/tenants").status_code == 200, PATIENCE)
    eventually_blocking(lambda: exposed.ready().get("postgres") == "up" and exposed.breaker("postgres") == 0.0, PATIENCE)


def test_without_redis_nobody_is_limited_and_afterwards_use_is_counted_again(exposed: Exposed) -> None:
    def counted() -> bool:
        answer = exposed.request("GET", "/v1/models")
        assert answer.status_code == 200, answer.text
        return "x-ratelimit-remaining-requests" in answer.headers

    assert counted()
    exposed.redis_wire.cut()
    assert not counted()
    eventually_blocking(lambda: not counted() and exposed.breaker("redis") == 1.0, PATIENCE)
    eventually_blocking(lambda: exposed.ready().get("redis") == "down" and exposed.health()["status"] == "degraded", PATIENCE)
    exposed.redis_wire.mend()
    eventually_blocking(lambda: counted() and exposed.breaker("redis") == 0.0, PATIENCE)
    exposed.serves()


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
    eventually_blocking(lambda: exposed.ready().get("publishing") == "down" and exposed.breaker() == 1.0, PATIENCE)
    letters = exposed.request("GET", "/v1/dead-letters")
    assert (letters.status_code, letters.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert exposed.request("GET", "/v1/tenants").status_code == 200
    exposed.kafka.start()
    exposed.kafka.wait_ready()
    eventually_blocking(lambda: exposed.request("POST", "/v1/memories", json=ITEM).status_code == 202, PATIENCE)
    eventually_blocking(lambda: exposed.breaker() == 0.0, PATIENCE)
    assert exposed.request("GET", "/v1/dead-letters").status_code == 200
    exposed.serves()


def test_a_stream_that_kafka_leaves_ends_with_an_error_event(exposed: Exposed) -> None:
    asyncio.run(_declare(exposed.kafka))
    eventually_blocking(lambda: exposed.request("GET", "/v1/models/silent/chat").status_code == 200, PATIENCE)
    body = {"model": "silent/chat", "messages": [{"role": "user", "content": "x"}], "stream": True}
    headers = {"authorization": f"Bearer {exposed.key}"}
    with httpx.stream("POST", f"{exposed.process.url}/v1/chat/completions", json=body, headers=headers, timeout=40) as answer:
        assert answer.status_code == 200
        exposed.kafka.kill()
        try:
            told = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        finally:
            exposed.start_kafka()
    assert json.loads(told[-1])["error"]["code"] == "timed_out"
    exposed.serves()


async def _declare(kafka: Kafka) -> None:
    """A model that nobody runs."""
    model = ModelReference(
        model_id="silent/chat", provider="none", capability="chat", encoding="o200k_base", template="openai-chat", exact=True
    )
    declared = ModelDeclared(model=model, description="Says nothing.", owned_by="tests")
    await CloudEventProducer(kafka.bootstrap_servers).publish("model.declared", declared, key=b"silent/chat", tenantid="platform")


def test_a_service_that_does_not_answer_is_a_504(exposed: Exposed) -> None:
    silence = exposed.request("POST", "/v1/memories/search", json={"query": "x"})
    assert (silence.status_code, silence.json()["error"]["code"]) == (504, "timed_out")


def test_without_the_object_store_uploads_are_503_and_the_rest_goes_on(exposed: Exposed) -> None:
    file = {"file": ("d.csv", b"a,b\n1,2\n", "text/csv")}
    assert exposed.request("POST", "/v1/datasets", files=file).status_code == 201
    store, away = exposed.folder / "objects", exposed.folder / "objects-away"
    store.rename(away)
    store.write_text("a file where a folder was")
    try:
        for _ in range(6):
            refused = exposed.request("POST", "/v1/datasets", files={"file": ("d.csv", b"a,b\n3,4\n", "text/csv")})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
            assert refused.headers["retry-after"]
        eventually_blocking(lambda: exposed.ready()["objects"] == "down" and exposed.breaker("objects") > 0, PATIENCE)
        assert exposed.health()["status"] == "degraded"
        assert exposed.remember().status_code == 202
    finally:
        store.unlink()
        away.rename(store)
    eventually_blocking(lambda: exposed.request("POST", "/v1/datasets", files=file).status_code == 201, PATIENCE)
    eventually_blocking(lambda: exposed.ready()["objects"] == "up" and exposed.breaker("objects") == 0.0, PATIENCE)


def test_started_without_kafka_it_refuses_with_a_reason_and_serves_once_kafka_is_there(exposed: Exposed) -> None:
    with exposed.restarted():
        refused = exposed.remember()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
        assert refused.headers["retry-after"]
        models = exposed.request("GET", "/v1/models")
        assert (models.status_code, models.json()["error"]["code"]) == (503, "dependency_unavailable")
        chat = exposed.request("POST", "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "x"}]})
        assert (chat.status_code, chat.json()["error"]["code"]) == (503, "dependency_unavailable")
        assert exposed.request("GET", "/v1/tenants").status_code == 200
        status = exposed.request("GET", "/v1/status").json()
        assert {service["status"] for service in status["services"]} == {"unknown"}
        assert exposed.health()["status"] == "unavailable"
        assert exposed.live()
        exposed.start_kafka()
        exposed.serves()
        assert exposed.request("GET", "/v1/models").status_code == 200


def test_started_without_kafka_it_spools_unless_its_disk_fails_and_hands_over_once_kafka_is_there(exposed: Exposed) -> None:
    spool, away = exposed.folder / "spool", exposed.folder / "spool-away"
    with exposed.restarted(TESSERA_GATEWAY__SPOOL__FOLDER=str(spool), TESSERA_GATEWAY__SPOOL__SEGMENT_BYTES="4096"):
        eventually_blocking(lambda: exposed.health()["status"] == "degraded", PATIENCE)
        kept = exposed.remember("said before Kafka was there")
        assert (kept.status_code, kept.json()["status"]) == (202, "spooled")
        assert exposed.request("GET", "/v1/models").status_code == 503

        assert exposed.remember("x" * 5_000).json()["status"] == "spooled"
        spool.rename(away)
        refused = exposed.remember("x" * 5_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
        assert refused.headers["retry-after"]
        eventually_blocking(lambda: exposed.health()["status"] == "unavailable", PATIENCE)
        away.rename(spool)
        assert exposed.remember("x" * 5_000).json()["status"] == "spooled"
        eventually_blocking(lambda: exposed.health()["status"] == "degraded", PATIENCE)

        exposed.start_kafka()
        eventually_blocking(lambda: exposed.request("GET", "/v1/spool").json()["spool"]["records"] == 0, PATIENCE)
        exposed.serves()
