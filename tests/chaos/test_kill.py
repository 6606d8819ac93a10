"""SIGKILL at a named point with an event in flight, then a restart: everything is there once, equal to a run without a kill.

Each test proves first that the kill hit: something was delivered again.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from chaos.injecting import table_held, waiting_for_lock
from chaos.observing import (
    PATIENCE_SECONDS,
    counter,
    distinct,
    messages,
    produce,
    records,
    repeated,
    rows,
    settled,
)

from tessera.testkit import ServiceProcess, eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

REDELIVERED = "tessera_bus_redelivered_events"
"""Counted by a process that finds a dead one's batch."""
RETRIED = "tessera_bus_retries"
"""Counted by a process that lived through a dead dependency and handled its batch again."""
MEMORIES = "SELECT id, origin_id, text, kind, version, importance FROM memory.memory WHERE tenant_id = $1 ORDER BY id"


def _tenant(name: str, *platforms: Platform) -> str:
    """A tenant on both platforms; memory knows it before anything is published."""
    for platform in platforms:
        platform.tenant(name)
        settled(platform, "SELECT 1 FROM memory.tenant WHERE tenant_id = $1", 1, name)
    return name


@contextmanager
def _armed(platform: Platform, service: str, point: str) -> Iterator[None]:
    """Inside, the service dies at the point; afterwards it is started again without it. Fails if it did not die there."""
    process = platform.processes[service]
    variable = f"TESSERA_{service.upper()}__CRASH_POINT"
    process.stop()
    process.override(**{variable: point})
    process.start()
    process.wait_ready()
    try:
        yield
        eventually_blocking(lambda: process.exit_code == -signal.SIGKILL, PATIENCE_SECONDS)
    finally:
        process.stop()
        process.override(**{variable: ""})
        process.start()
        process.wait_ready()


def _redelivered(platform: Platform, service: str) -> None:
    eventually_blocking(lambda: counter(platform, service, REDELIVERED) >= 1, PATIENCE_SECONDS)


def test_memory_killed_between_effect_and_commit(unkilled: Platform, killed: Platform) -> None:
    tenant, events = _tenant("kill-memory", unkilled, killed), messages("one", 20)
    produce(unkilled, tenant, events)
    with _armed(killed, "memory", "consumed_before_commit"):
        produce(killed, tenant, events)
    _redelivered(killed, "memory")
    expected, found = (settled(platform, MEMORIES, len(events), tenant) for platform in (unkilled, killed))
    assert found == expected
    assert _recorded(killed, tenant, len(events)) == _recorded(unkilled, tenant, len(events))


def test_memory_killed_between_publishing_and_forgetting_its_outbox(unkilled: Platform, killed: Platform) -> None:
    tenant, events = _tenant("kill-relay", unkilled, killed), messages("two", 20)
    produce(unkilled, tenant, events)
    with _armed(killed, "memory", "relay_published_before_delete"):
        produce(killed, tenant, events)
    expected = _recorded(unkilled, tenant, len(events))
    eventually_blocking(lambda: repeated(records(killed, "memory.recorded", tenant)) >= 1, PATIENCE_SECONDS)
    assert _recorded(killed, tenant, len(events)) == expected
    projected = "SELECT memory_id, kind, version, importance FROM retention.memories WHERE tenant_id = $1 ORDER BY memory_id"
    assert settled(killed, projected, len(events), tenant) == settled(unkilled, projected, len(events), tenant)


def test_tokenizer_killed_between_publishing_and_its_offset(unkilled: Platform, killed: Platform) -> None:
    tenant, events = _tenant("kill-tokenizer", unkilled, killed), messages("three", 12)
    produce(unkilled, tenant, events)
    with _armed(killed, "tokenizer", "emitted_before_offset"):
        produce(killed, tenant, events)
    eventually_blocking(lambda: repeated(records(killed, "text.tokenized", tenant)) >= 1, PATIENCE_SECONDS)
    expected, found = (_once(platform, "text.tokenized", tenant, len(events)) for platform in (unkilled, killed))
    assert found == expected
    learned = "SELECT * FROM generator.ngram WHERE tenant_id = $1"
    counted = "SELECT count(*) FROM generator.ngram_learned WHERE tenant_id = $1 HAVING count(*) = 12"
    for platform in (unkilled, killed):
        settled(platform, counted, 1, tenant)
    assert sorted(map(repr, rows(killed, learned, tenant))) == sorted(map(repr, rows(unkilled, learned, tenant)))


def test_retention_killed_between_effect_and_commit(unkilled: Platform, killed: Platform) -> None:
    tenant, events = _tenant("kill-retention", unkilled, killed), messages("four", 20)
    produce(unkilled, tenant, events)
    with _armed(killed, "retention", "consumed_before_commit"):
        produce(killed, tenant, events)
    _redelivered(killed, "retention")
    projected = (
        "SELECT memory_id, kind, occurred_at, version, importance, archived FROM retention.memories WHERE tenant_id = $1 ORDER BY memory_id"
    )
    assert settled(killed, projected, len(events), tenant) == settled(unkilled, projected, len(events), tenant)


def test_generator_killed_between_effect_and_commit(unkilled: Platform, killed: Platform) -> None:
    tenant = "kill-generator"
    keys = {id(platform): platform.tenant(tenant) for platform in (unkilled, killed)}
    for platform in (unkilled, killed):
        settled(platform, "SELECT 1 FROM memory.tenant WHERE tenant_id = $1", 1, tenant)
        produce(platform, tenant, messages("five", 5))
        settled(platform, "SELECT 1 FROM memory.memory_vec WHERE tenant_id = $1", 5, tenant)
    expected = _chat(unkilled, keys[id(unkilled)])
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(_chat(killed, keys[id(killed)])))
    with _armed(killed, "generator", "consumed_before_commit"):
        asking.start()
    asking.join(PATIENCE_SECONDS)
    _redelivered(killed, "generator")
    assert answers == [expected]
    assert "lamp" in expected["choices"][0]["message"]["content"]
    assert repeated(records(killed, "reply", tenant)) == 0


def test_validator_killed_between_effect_and_commit(unkilled: Platform, killed: Platform) -> None:
    tenant = "kill-validator"
    keys = {id(platform): platform.tenant(tenant) for platform in (unkilled, killed)}
    expected = _verdict(unkilled, keys[id(unkilled)], _validate(unkilled, keys[id(unkilled)]))
    with _armed(killed, "validator", "consumed_before_commit"):
        validation = _validate(killed, keys[id(killed)])
    _redelivered(killed, "validator")
    assert _verdict(killed, keys[id(killed)], validation) == expected
    assert len(distinct(records(killed, "validation.completed", tenant))) == 1


@pytest.fixture
def without_spool(killed: Platform) -> Iterator[None]:
    """The gateway publishes itself what it accepts, also in the moment in which it has not reached Kafka yet."""
    process, folder = killed.processes["gateway"], "TESSERA_GATEWAY__SPOOL__FOLDER"
    process.override(**{folder: ""})
    yield
    process.stop()
    process.override(**{folder: killed.settings[folder]})
    process.start()
    process.wait_ready()


@pytest.mark.usefixtures("without_spool")
def test_gateway_killed_between_publishing_and_answering(unkilled: Platform, killed: Platform) -> None:
    tenant = "kill-gateway"
    keys = {id(platform): platform.tenant(tenant) for platform in (unkilled, killed)}
    for platform in (unkilled, killed):
        settled(platform, "SELECT 1 FROM memory.tenant WHERE tenant_id = $1", 1, tenant)
    expected = _remember(unkilled, keys[id(unkilled)])
    with _armed(killed, "gateway", "published_before_answer"), pytest.raises(httpx.TransportError):
        _remember(killed, keys[id(killed)])
    answer = _remember(killed, keys[id(killed)])
    for told in (answer, expected):
        assert told["consistency"].pop("token"), "it says when it was given: no two are alike"
    assert answer == expected
    eventually_blocking(lambda: repeated(records(killed, f"ingest.{tenant}", tenant)) >= 1, PATIENCE_SECONDS)
    eventually_blocking(lambda: counter(killed, "memory", "tessera_bus_duplicate_events") >= 1, PATIENCE_SECONDS)
    content = "SELECT id, origin_id, text, version FROM memory.memory WHERE tenant_id = $1"
    assert settled(killed, content, 1, tenant) == settled(unkilled, content, 1, tenant)


def test_postgres_killed_inside_a_transaction(unkilled: Platform, killed: Platform) -> None:
    postgres = killed.stack.postgres
    if postgres is None:
        pytest.fail("this test needs a Postgres of its own: unset DATABASE_URL")
    tenant, events = _tenant("kill-postgres", unkilled, killed), messages("six", 20)
    produce(unkilled, tenant, events)
    expected = settled(unkilled, MEMORIES, len(events), tenant)
    retried = counter(killed, "memory", RETRIED)
    _all_indexed(killed)
    with table_held(killed, "memory.memory"):
        produce(killed, tenant, events)
        eventually_blocking(lambda: waiting_for_lock(killed), PATIENCE_SECONDS)
        postgres.kill()
    postgres.start()
    postgres.wait_ready()
    eventually_blocking(lambda: counter(killed, "memory", RETRIED) > retried, PATIENCE_SECONDS)
    assert settled(killed, MEMORIES, len(events), tenant) == expected
    assert _recorded(killed, tenant, len(events)) == _recorded(unkilled, tenant, len(events))
    _become_whole(unkilled, killed)


def test_kafka_killed_between_effect_and_publishing(unkilled: Platform, killed: Platform) -> None:
    kafka = killed.stack.kafka
    if kafka is None:
        pytest.fail("this test needs a Kafka of its own: unset KAFKA_BOOTSTRAP_SERVERS")
    tenant, events = _tenant("kill-kafka", unkilled, killed), messages("seven", 20)
    produce(unkilled, tenant, events)
    expected = settled(unkilled, MEMORIES, len(events), tenant)
    recorded = _recorded(unkilled, tenant, len(events))
    waited = _times_the_relay_waited(killed)
    _all_indexed(killed)
    with table_held(killed, "memory.memory"):
        produce(killed, tenant, events)
        eventually_blocking(lambda: waiting_for_lock(killed), PATIENCE_SECONDS)
        kafka.kill()
    try:
        eventually_blocking(lambda: rows(killed, "SELECT 1 FROM memory.outbox"), PATIENCE_SECONDS)
        eventually_blocking(lambda: _times_the_relay_waited(killed) > waited, PATIENCE_SECONDS)
    finally:
        kafka.start()
        kafka.wait_ready()
    assert settled(killed, MEMORIES, len(events), tenant) == expected
    assert _recorded(killed, tenant, len(events)) == recorded
    _become_whole(unkilled, killed)


def _all_indexed(platform: Platform) -> None:
    """Waits until nothing of an earlier test is left to do, which would wait for the table, too."""
    eventually_blocking(lambda: not rows(platform, "SELECT 1 FROM memory.index_task LIMIT 1"), PATIENCE_SECONDS)


def _times_the_relay_waited(platform: Platform) -> int:
    """How often the relay tried in vain to publish what is in flight, and will have to deliver it again."""
    return (platform.home / "logs" / "memory.log").read_text(encoding="utf-8").count("outbox relay waits")


def _become_whole(*platforms: Platform) -> None:
    """Waits until every service is ready and none makes do without something, as a gateway with a spool does without Kafka."""
    for platform in platforms:
        for process in platform.processes.values():
            eventually_blocking(lambda process=process: _says(process) == "ready", PATIENCE_SECONDS)  # type: ignore[misc]


def _says(process: ServiceProcess) -> str:
    return str(json.loads(process.get_admin("/health/ready")[1])["status"])


def _recorded(platform: Platform, tenant: str, count: int) -> dict[str, Any]:
    return _once(platform, "memory.recorded", tenant, count, without=("recorded_at",))


def _once(platform: Platform, topic: str, tenant: str, count: int, without: tuple[str, ...] = ()) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        found = distinct(records(platform, topic, tenant), without=without)
        assert len(found) == count, f"{len(found)} of {count} on {topic}"
        return found

    return eventually_blocking(look, PATIENCE_SECONDS)


def _chat(platform: Platform, key: str) -> dict[str, Any]:
    body = {
        "model": "local/quote",
        "messages": [{"role": "user", "content": "Which lamp did message 3 speak of?"}],
        "tessera": {"memory": {"limit": 3, "conversation_id": "five"}},
    }
    answer = platform.request("POST", "/v1/chat/completions", key=key, json=body, headers={"Idempotency-Key": "the-question"})
    answer.raise_for_status()
    return {name: value for name, value in answer.json().items() if name != "created"}


def _validate(platform: Platform, key: str) -> str:
    rows_of_table = [f"{number % 17},{number * number % 23},{number * 31 % 101}" for number in range(400)]
    datasets = [
        platform.request(
            "POST",
            "/v1/datasets",
            key=key,
            files={"file": (f"{name}.csv", "\n".join(["a,b,c", *part]), "text/csv")},
            headers={"Idempotency-Key": name},
        )
        for name, part in (("reference", rows_of_table[::2]), ("candidate", rows_of_table[1::2]))
    ]
    body = {"dataset": datasets[1].json()["id"], "reference": datasets[0].json()["id"]}
    answer = platform.request("POST", "/v1/validations", key=key, json=body, headers={"Idempotency-Key": "the-validation"})
    answer.raise_for_status()
    return str(answer.json()["id"])


def _verdict(platform: Platform, key: str, validation: str) -> Any:
    def look() -> Any:
        answer = platform.request("GET", f"/v1/validations/{validation}", key=key)
        return answer.json()["report"] if answer.is_success else None

    return validation, eventually_blocking(look, PATIENCE_SECONDS)


def _remember(platform: Platform, key: str) -> dict[str, Any]:
    body = {"type": "message", "conversation_id": "c", "role": "user", "content": "Once only.", "occurred_at": "2026-01-01T00:00:00Z"}
    answer = platform.request("POST", "/v1/memories", key=key, json=body, headers={"Idempotency-Key": "once"})
    answer.raise_for_status()
    return dict(answer.json())
