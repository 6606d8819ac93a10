"""What each service does while something that it needs is gone, and afterwards: the tables in the services' README.md that need neighbours.

On servers that no other test depends on: Kafka and Redis are killed, the way to memory's Postgres is cut, memory itself is frozen.
"""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tessera.local.environment import SERVICES
from tessera.testkit import ServiceProcess, Stack, Wire, eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 150.0


@dataclass
class Exposed:
    """A platform on servers of its own, and a tenant's key."""

    platform: Platform
    wire: Wire
    """The way from memory to its Postgres."""
    key: str

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        return self.platform.request(method, path, key=self.key, **arguments)

    def says(self, service: str) -> tuple[int, str, str]:
        """HTTP status of readiness and of liveness, and the word for readiness."""
        process = self.platform.processes[service]
        try:
            status, body = process.get_admin("/health/ready")
            return status, str(json.loads(body)["status"]), str(process.get_admin("/health/live")[0])
        except OSError:  # a busy machine
            return 0, "", ""

    def becomes(self, service: str, status: int, word: str) -> None:
        """Waits until it is ready or not, and checks that it lives."""
        eventually_blocking(lambda: self.says(service) == (status, word, "200"), PATIENCE_SECONDS)

    def breaker(self, service: str, dependency: str) -> tuple[str, float, str]:
        """What readiness, metrics and `/v1/status` say of a breaker."""
        process = self.platform.processes[service]
        ready = json.loads(process.get_admin("/health/ready")[1])["dependencies"][dependency]["breaker"]
        wanted = f'tessera_breaker_open{{dependency="{dependency}"}} '
        (value,) = [line.removeprefix(wanted) for line in process.get_admin("/metrics")[1].splitlines() if line.startswith(wanted)]
        services = self.platform.request("GET", "/v1/status").json()["services"]
        (replica,) = next(found["replicas"] for found in services if found["service"] == service)
        told = next(each["breaker"] for each in replica["dependencies"] if each["name"] == dependency)
        return ready, float(value), told

    def remember(self, name: str, content: str = "The spare key is under the blue flowerpot.", **more: Any) -> None:
        item = {"type": "message", "id": name, "conversation_id": name, "role": "user", "content": content, **more}
        self.ask("POST", "/v1/memories", json=item).raise_for_status()

    def is_searchable(self, name: str) -> bool:
        answer = self.ask("GET", f"/v1/ingest/{name}")
        return bool(answer.is_success and answer.json()["status"] == "searchable")

    def search(self, query: str = "Where is the key?") -> Any:
        return self.ask("POST", "/v1/memories/search", json={"query": query})


@pytest.fixture(scope="module")
def exposed() -> Iterator[Exposed]:
    stack = Stack()
    stack.start()
    wire: Wire | None = None
    platform: Platform | None = None
    try:
        port = int(stack.database_url.rpartition(":")[2].partition("/")[0])
        wire = Wire(port)
        settings = {
            "TESSERA_GATEWAY__PUBLISH_TIMEOUT_SECONDS": "2",
            "TESSERA_GATEWAY__QUESTION_TIMEOUT_SECONDS": "6",
            "TESSERA_MEMORY__POSTGRES__PORT": str(wire.port),
            "TESSERA_MEMORY__QUERY_CACHE__BREAKER_RESET_SECONDS": "1",
            "TESSERA_RETENTION__SWEEPS__CONFIRMATION_SECONDS": "3",
        }
        platform = Platform(stack, settings=settings)
        platform.start()
        yield Exposed(platform, wire, platform.tenant("acme"))
    finally:
        if platform is not None:
            platform.stop()
        if wire is not None:
            wire.cut()
        stack.stop()


# --- Kafka --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outage:
    """What was seen of each service while Kafka was dead, and once it was back."""

    during: dict[str, tuple[int, str, str]]
    afterwards: dict[str, tuple[int, str, str]]
    exit_codes: dict[str, int | None]


@pytest.fixture(scope="module")
def kafka_outage(exposed: Exposed) -> Outage:
    """Kafka is killed and started again, once for all services; none of them is restarted."""
    kafka = exposed.platform.stack.kafka
    if kafka is None:
        pytest.fail("this test needs a Kafka of its own: unset KAFKA_BOOTSTRAP_SERVERS")
    exposed.remember("before-the-outage")
    eventually_blocking(lambda: exposed.is_searchable("before-the-outage"), PATIENCE_SECONDS)
    kafka.kill()
    try:
        during = {service: _settled(exposed, service, 503) for service in SERVICES}
    finally:
        kafka.start()
        kafka.wait_ready()
    afterwards = {service: _settled(exposed, service, 200) for service in SERVICES}
    return Outage(during, afterwards, {name: process.exit_code for name, process in exposed.platform.processes.items()})


def _settled(exposed: Exposed, service: str, status: int) -> tuple[int, str, str]:
    return eventually_blocking(lambda: told if (told := exposed.says(service))[0] == status else None, PATIENCE_SECONDS)


@pytest.mark.parametrize("service", SERVICES)
def test_without_kafka_a_service_lives_is_not_ready_and_recovers_without_a_restart(service: str, kafka_outage: Outage) -> None:
    assert kafka_outage.during[service] == (503, "unavailable", "200")
    assert kafka_outage.afterwards[service][::2] == (200, "200")
    assert kafka_outage.exit_codes[service] is None


@pytest.mark.usefixtures("kafka_outage")
def test_after_kafka_was_away_the_gateway_accepts_and_memory_and_tokenizer_take_in(exposed: Exposed) -> None:
    exposed.remember("after-the-outage")
    eventually_blocking(lambda: exposed.is_searchable("after-the-outage"), PATIENCE_SECONDS)
    tokens = exposed.ask("POST", "/v1/tokenize", json={"encoding": "o200k_base", "text": "spare key"})
    assert tokens.status_code == 200


@pytest.mark.usefixtures("kafka_outage")
def test_after_kafka_was_away_the_generator_answers(exposed: Exposed) -> None:
    chat = {"model": "local/quote", "messages": [{"role": "user", "content": "Where is the key?"}], "tessera": {"memory": {"limit": 5}}}
    answer = exposed.ask("POST", "/v1/chat/completions", json=chat)
    assert answer.status_code == 200
    assert "flowerpot" in answer.json()["choices"][0]["message"]["content"]


@pytest.mark.usefixtures("kafka_outage")
def test_after_kafka_was_away_retention_and_the_validator_answer(exposed: Exposed) -> None:
    assert exposed.ask("PUT", "/v1/retention/policy", json={"max_age_days": 3650}).status_code == 200
    unknown = exposed.ask("GET", "/v1/validations/nothing-of-that-name")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "validation_not_found")


# --- Redis --------------------------------------------------------------------------------------------


def test_without_redis_memory_is_degraded_answers_the_same_and_recovers(exposed: Exposed) -> None:
    redis = exposed.platform.stack.redis
    if redis is None:
        pytest.fail("this test needs a Redis of its own: unset REDIS_URL")
    exposed.remember("redis")
    eventually_blocking(lambda: exposed.is_searchable("redis"), PATIENCE_SECONDS)
    found = exposed.search().json()
    redis.kill()
    try:
        for number in range(4):
            assert exposed.search(f"Question number {number}?").status_code == 200
        again = exposed.search().json()
        assert [each["id"] for each in again["data"]] == [each["id"] for each in found["data"]]
        assert again["degraded"] == found["degraded"] == []
        exposed.becomes("memory", 200, "degraded")
        eventually_blocking(lambda: _is_open(exposed.breaker("memory", "redis")), PATIENCE_SECONDS)
    finally:
        redis.start()
        redis.wait_ready()
    eventually_blocking(lambda: exposed.search("Is it back?") and exposed.breaker("memory", "redis") == CLOSED, PATIENCE_SECONDS)
    exposed.becomes("memory", 200, "ready")


CLOSED = ("closed", 0.0, "closed")


def _is_open(told: tuple[str, float, str]) -> bool:
    """Everywhere; half open where the next call is let through as the probe."""
    return told[0] != "closed" and told[1] > 0.0 and told[2] != "closed"


# --- memory's Postgres ----------------------------------------------------------------------------------


def test_without_its_postgres_memory_is_not_ready_and_ingestion_waits_in_the_log(exposed: Exposed) -> None:
    exposed.wire.cut()
    try:
        exposed.remember("postgres")
        exposed.becomes("memory", 503, "unavailable")
        silence = exposed.search()
        assert (silence.status_code, silence.json()["error"]["code"]) in ((504, "timed_out"), (503, "dependency_unavailable"))
        eventually_blocking(lambda: _is_open(exposed.breaker("memory", "postgres")), PATIENCE_SECONDS)
        assert exposed.says("retention")[0] == 200, "another service's Postgres is not this one's"
    finally:
        exposed.wire.mend()
    eventually_blocking(lambda: exposed.is_searchable("postgres"), PATIENCE_SECONDS)
    eventually_blocking(lambda: exposed.breaker("memory", "postgres") == CLOSED, PATIENCE_SECONDS)
    exposed.becomes("memory", 200, "ready")


# --- a neighbour ----------------------------------------------------------------------------------------


def test_a_frozen_memory_is_a_504_and_ends_sweeps_that_wait_for_it(exposed: Exposed) -> None:
    for number in range(3):
        exposed.remember(f"old-{number}", occurred_at="2020-01-01T00:00:00Z")
        eventually_blocking(lambda number=number: exposed.is_searchable(f"old-{number}"), PATIENCE_SECONDS)  # type: ignore[misc]
    assert exposed.ask("PUT", "/v1/retention/policy", json={"max_age_days": 30}).status_code == 200
    eventually_blocking(lambda: _sweep(exposed, _ordered(exposed, dry_run=True), "planned")["planned"] >= 3, PATIENCE_SECONDS)
    memory = psutil.Process(_pid(exposed.platform.processes["memory"]))
    memory.send_signal(signal.SIGSTOP)
    try:
        silence = exposed.search()
        assert (silence.status_code, silence.json()["error"]["code"]) == (504, "timed_out")
        overdue = _sweep(exposed, _ordered(exposed, dry_run=False), "failed")
        assert overdue["problem"]["code"] == "confirmation_overdue"
    finally:
        memory.send_signal(signal.SIGCONT)
    eventually_blocking(lambda: exposed.search().status_code == 200, PATIENCE_SECONDS)
    _sweep(exposed, _ordered(exposed, dry_run=False), "completed")


def _pid(process: ServiceProcess) -> int:
    pid = process.pid
    assert pid is not None
    return pid


def _ordered(exposed: Exposed, *, dry_run: bool) -> str:
    answer = exposed.ask("POST", "/v1/retention/sweeps", json={"dry_run": dry_run})
    assert answer.status_code == 202
    return str(answer.json()["id"])


def _sweep(exposed: Exposed, sweep_id: str, state: str) -> Any:
    """The sweep, once it is in that state."""

    def look() -> Any:
        told = exposed.ask("GET", f"/v1/retention/sweeps/{sweep_id}").json()
        return told if told.get("status") == state else None

    return eventually_blocking(look, PATIENCE_SECONDS)
