"""Every service really emits what the catalogue says, and nothing else: read from the log after each endpoint was used."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import api_page
import httpx
import pytest
from jsonschema import Draft202012Validator
from kafka_records import Stored, produce, read_all, topics

from tessera.contracts import uuid7
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import SERVICES, TOPICS, Topic
from tessera.contracts.schemas import writer_schema
from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.contract, pytest.mark.timeout(180)]

TENANT = "emitters"
PATIENCE = timedelta(seconds=60)
EXAMPLES = Path(__file__).parents[2] / "libs" / "contracts" / "examples"
EMITTED = [topic for topic in TOPICS.values() if set(topic.producers) & set(SERVICES)]


@pytest.fixture(scope="module")
def used(platform: Platform) -> Platform:
    """The platform after every example of the API page, a refusal, two failures, an archive and a cancellation."""
    for line in api_page.lines():
        api_page.run(platform, line, platform.admin_key)
    key = platform.tenant(TENANT)
    headers = {"specversion": "1.0", "id": "malformed", "source": "/stranger", "type": "tessera.message.published.v1", "tenantid": TENANT}
    produce(platform, "ingest", b"{}", [(f"ce_{name}", value.encode()) for name, value in headers.items()])
    assert platform.request("POST", "/v1/detokenize", key=key, json={"composition_id": "00" * 32}).status_code == 404
    _fail_a_generation(platform, key)
    _ask_too_much(platform)
    _archive(platform, key)
    _leave_a_generation(platform, key)
    return platform


def _fail_a_generation(platform: Platform, key: str) -> None:
    answer = platform.request("POST", "/v1/completions", key=key, json={"model": "local/ngram", "prompt": "The"})
    assert answer.json()["error"]["code"] == "model_has_learned_nothing"


def _ask_too_much(platform: Platform) -> None:
    """A prompt that the tokenizer refuses: no model of a bare platform has so small a context."""
    example = json.loads((EXAMPLES / "generation.requested" / "v1" / "chat.json").read_text())
    name = str(uuid7())
    example["data"]["model"]["context_tokens"] = 1
    attributes = {**example["attributes"], "id": name, "tenantid": TENANT}
    data = {**example["data"], "generation_id": name}
    produce(
        platform, "generation.requested", json.dumps(data).encode(), [(f"ce_{key}", value.encode()) for key, value in attributes.items()]
    )


def _archive(platform: Platform, key: str) -> None:
    long_ago = (datetime.now(UTC) - timedelta(days=9)).isoformat()
    item = {"type": "message", "id": "old", "conversation_id": "c", "role": "user", "content": "Long ago.", "occurred_at": long_ago}
    platform.request("POST", "/v1/memories", key=key, json=item).raise_for_status()
    eventually_blocking(lambda: platform.request("GET", "/v1/ingest/old", key=key).json()["status"] == "searchable", PATIENCE)
    platform.request("PUT", "/v1/retention/policy", key=key, json={"max_age_days": 2}).raise_for_status()

    def archived() -> bool:
        sweep = platform.request("POST", "/v1/retention/sweeps", key=key, json={"dry_run": False}).json()
        done = eventually_blocking(lambda: _finished(platform, key, sweep["url"]), PATIENCE)
        return bool(done["data"])

    eventually_blocking(archived, PATIENCE)


def _finished(platform: Platform, key: str, url: str) -> dict[str, Any] | None:
    sweep: dict[str, Any] = platform.request("GET", url, key=key).json()
    return sweep if sweep["status"] == "completed" else None


def _leave_a_generation(platform: Platform, key: str) -> None:
    """The client is gone before the generator, which is paused meanwhile, has begun."""
    _control(platform, "pause", "paused")
    body = {"model": "local/quote", "messages": [{"role": "user", "content": "Who is there?"}], "stream": True}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", f"{platform.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=2
        ) as stream,
    ):
        stream.read()
    _control(platform, "resume", "running")


def _control(platform: Platform, action: str, state: str) -> None:
    platform.request("POST", "/v1/services/generator/control", json={"action": action, "consumer": "chat"}).raise_for_status()

    def obeyed() -> bool:
        services = platform.request("GET", "/v1/status").json()["services"]
        (generator,) = (service for service in services if service["service"] == "generator")
        states = {consumer["state"] for replica in generator["replicas"] for consumer in replica["consumers"] if consumer["name"] == "chat"}
        return states == {state}

    eventually_blocking(obeyed, PATIENCE)


@dataclass(frozen=True)
class Emitted:
    """An event that a service wrote."""

    topic: Topic
    service: str
    record: Stored

    @property
    def event(self) -> str:
        """Its type."""
        return self.record.header("ce_type")


def _emitted(platform: Platform) -> Iterator[Emitted]:
    """Everything that services wrote, dead letters aside."""
    sources: Mapping[str, str] = {f"/tessera/{service}": service for service in SERVICES}
    names = {name: topic for name in topics(platform) for topic in [_topic_of(name)] if topic is not None}
    for record in read_all(platform, *names):
        service = sources.get(record.header("ce_source"))
        if service is not None:
            yield Emitted(names[record.topic], service, record)


def _topic_of(name: str) -> Topic | None:
    """The catalogue's topic behind a topic of the cluster: itself, or a tenant's own."""
    if name.endswith(".dlq"):
        return None
    return TOPICS.get(name) or TOPICS.get(name.rpartition(".")[0])


@pytest.mark.parametrize("topic", EMITTED, ids=lambda topic: topic.name)
def test_what_is_declared_is_emitted(used: Platform, topic: Topic) -> None:
    types = {event.event_type for event in topic.event_types if topic.name != "ingest"}

    def all_there() -> bool:
        found = [emitted for emitted in _emitted(used) if emitted.topic is topic]
        missing = types - {emitted.event for emitted in found}
        silent = (set(topic.producers) & set(SERVICES)) - {emitted.service for emitted in found}
        assert not missing, f"nobody emitted {missing}"
        assert not silent, f"{silent} emitted nothing on {topic.name}"
        return True

    eventually_blocking(all_there, PATIENCE)


def test_what_is_emitted_is_declared(used: Platform) -> None:
    undeclared = {
        (emitted.service, emitted.event, emitted.topic.name)
        for emitted in _emitted(used)
        if emitted.service not in emitted.topic.producers or emitted.event not in _types(emitted.topic)
    }
    assert not undeclared


def test_what_is_emitted_is_as_its_schema_says(used: Platform) -> None:
    schemas = {event.event_type: Draft202012Validator(writer_schema(event)) for topic in EMITTED for event in topic.event_types}
    wrong = {
        (emitted.service, emitted.event, error.message)
        for emitted in _emitted(used)
        if emitted.record.value is not None
        for error in schemas[emitted.event].iter_errors(json.loads(emitted.record.value))
    }
    assert not wrong


def _types(topic: Topic) -> Mapping[str, type[EventData]]:
    return {event.event_type: event for event in topic.event_types}
