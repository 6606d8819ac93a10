"""Every consumer takes what its producers write: as registered, as decoded, and as six running services."""

import json
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kafka_records import lag, produce, read_all, topics

from tessera.bus.codec import decode, rfc3339
from tessera.bus.service import Runtime
from tessera.bus.settings import ServiceSettings
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import SERVICES, TOPICS, Mode, Topic, consumed_by, consumer_group, dead_letter_topic
from tessera.contracts.errors import InvalidError
from tessera.contracts.schemas import SchemaStore
from tessera.gateway import app as gateway
from tessera.gateway.settings import GatewaySettings
from tessera.generator import app as generator
from tessera.generator.settings import GeneratorSettings
from tessera.memory import app as memory
from tessera.memory.settings import MemorySettings
from tessera.retention import app as retention
from tessera.retention.settings import RetentionSettings
from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform
from tessera.tokenizer import app as tokenizer
from tessera.tokenizer.settings import TokenizerSettings
from tessera.validator import app as validator
from tessera.validator.settings import ValidatorSettings

pytestmark = [pytest.mark.contract, pytest.mark.timeout(180)]

STORE = SchemaStore(Path(__file__).parents[2] / "libs" / "contracts")
PATIENCE = timedelta(seconds=90)
TENANT = "contracts"
SOURCE = "/contract-test"

BUILDS: Mapping[str, tuple[type[ServiceSettings], Callable[[Any], Awaitable[None]]]] = {
    "gateway": (GatewaySettings, gateway.build),
    "tokenizer": (TokenizerSettings, tokenizer.build),
    "memory": (MemorySettings, memory.build),
    "generator": (GeneratorSettings, generator.build),
    "retention": (RetentionSettings, retention.build),
    "validator": (ValidatorSettings, validator.build),
}


# --- what is registered ---------------------------------------------------------------------------


def _catalogued(service: str) -> set[tuple[str, str, Mode]]:
    """(event type, traffic class, mode) of everything that the catalogue has a service read."""
    return {
        (event.event_type, str(consumer.traffic_class), consumer.mode)
        for topic in consumed_by(service)
        if (consumer := topic.consumer(service))
        for event in topic.event_types
    }


async def _registered(service: str, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, Mode]]:
    """The same of a service that is built by its own `build` and never started."""
    monkeypatch.setattr(Runtime, "add_http_server", lambda *_, **__: ("", 0))  # a port would stay open: nothing runs that could close it
    settings_class, build = BUILDS[service]
    passwords = {"worker_password": "never-used", "client_password": "never-used", "authenticator_password": "never-used"}
    settings = settings_class.model_validate({"profile": "test", "postgres": passwords, **({"port": 0} if service == "gateway" else {})})
    runtime: Runtime[Any] = Runtime(settings)
    try:
        await build(runtime)
        return {(event.event_type, str(traffic_class), mode) for event, traffic_class, mode in runtime.bus.reads()}
    finally:
        for close in (*runtime._closing, runtime.database.close):
            await close()


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_reads_exactly_what_the_catalogue_says(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _registered(service, monkeypatch) == _catalogued(service)


# --- what is decoded ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A stored example of an event, on the topic that carries it."""

    topic: Topic
    event: type[EventData]
    name: str

    def __str__(self) -> str:
        return f"{self.event.event_type} {self.name}"

    @property
    def stored(self) -> dict[str, Any]:
        """Attributes and data, as committed."""
        return dict(STORE.examples(self.event)[self.name])


@dataclass(frozen=True)
class Record:
    """A record as aiokafka gives it."""

    topic: str
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    key: bytes | None = b"key"
    partition: int = 3
    offset: int = 17
    timestamp: int = 1_790_000_000_000


EXAMPLES = [Example(topic, event, name) for topic in TOPICS.values() for event in topic.event_types for name in STORE.examples(event)]
READ = [example for example in EXAMPLES if example.topic.consumers]
INGESTED = [example for example in READ if example.topic.name == "ingest"]
INSIDE = [example for example in READ if example.topic.name != "ingest"]


def _record(example: Example, data: Any) -> Record:
    headers = tuple((f"ce_{name}", str(value).encode()) for name, value in example.stored["attributes"].items())
    return Record(example.topic.name, json.dumps(data).encode(), (*headers, ("content-type", b"application/json")))


def test_every_event_that_travels_has_an_example() -> None:
    assert {example.event for example in EXAMPLES} == {event for topic in TOPICS.values() for event in topic.event_types}


@pytest.mark.parametrize("example", READ, ids=str)
def test_an_example_is_decoded_as_its_consumers_read_it(example: Example) -> None:
    attributes, data = example.stored["attributes"], example.stored["data"]
    received = decode(_record(example, data), example.topic, example.topic.name)
    assert received.data == example.event.model_validate(data)
    assert (received.id, received.source, received.type) == (attributes["id"], attributes["source"], example.event.event_type)
    assert received.tenant_id == attributes["tenantid"]
    assert received.time == datetime.fromisoformat(attributes["time"])


@pytest.mark.parametrize("example", INGESTED, ids=str)
def test_an_unknown_field_from_outside_is_refused_by_name(example: Example) -> None:
    with pytest.raises(InvalidError) as refused:
        decode(_record(example, {**example.stored["data"], "planted": 1}), example.topic, example.topic.name)
    assert (refused.value.code, refused.value.field) == ("data_invalid", "planted")


@pytest.mark.parametrize("example", INSIDE, ids=str)
def test_an_unknown_field_from_inside_is_passed_over(example: Example) -> None:
    data = example.stored["data"]
    received = decode(_record(example, {**data, "planted": 1}), example.topic, example.topic.name)
    assert received.data == example.event.model_validate(data)


@pytest.mark.parametrize("example", INSIDE, ids=str)
def test_unknown_fields_at_any_depth_from_inside_are_passed_over(example: Example) -> None:
    received = decode(_record(example, _planted(example.stored["data"])), example.topic, example.topic.name)
    assert type(received.data) is example.event


def _planted(value: Any) -> Any:
    if isinstance(value, dict):
        return {**{name: _planted(child) for name, child in value.items()}, "planted": 1}
    return [_planted(child) for child in value] if isinstance(value, list) else value


# --- what running services take ---------------------------------------------------------------------

SEMANTIC: Mapping[tuple[str, str], str] = {
    ("tessera.tokenization.requested.v1", "composition.json"): "composition_not_found",
    ("tessera.validation.inspected.v1", "minimal.json"): "dataset_not_found",
    ("tessera.validation.cancelled.v1", "minimal.json"): "validation_not_found",
    ("tessera.sweep.cancelled.v1", "minimal.json"): "sweep_not_found",
}
"""Examples that are answered with a problem because of what is not there (a composition; the dataset of the validation that another
example asks for, unless that is still queued), and the code. Everything else must succeed."""

REQUESTED = [example for example in READ if any(consumer.mode is not Mode.BROADCAST for consumer in example.topic.consumers)]


@pytest.fixture(scope="module")
def published(platform: Platform) -> dict[str, Example]:
    """Every example that a group consumes, written by a stranger: event id → example."""
    platform.tenant(TENANT)
    ids = {str(uuid.uuid4()): example for example in REQUESTED}
    for event_id, example in ids.items():
        attributes = {
            **example.stored["attributes"],
            "id": event_id,
            "source": SOURCE,
            "tenantid": TENANT,
            "deadline": rfc3339(datetime.now(UTC) + timedelta(minutes=10)),
        }
        headers = [(f"ce_{name}", str(value).encode()) for name, value in attributes.items()]
        value = json.dumps(example.stored["data"]).encode()
        produce(platform, example.topic.name, value, [*headers, ("content-type", b"application/json")], event_id.encode())

    def caught_up() -> bool:
        behind = _behind(platform)
        assert not behind, behind
        return True

    eventually_blocking(caught_up, PATIENCE)
    return ids


def _behind(platform: Platform) -> dict[str, int]:
    """Lag of each consumer that has not read everything."""
    found = {f"{group} on {topic}": lag(platform, group, topic) for group, topic in _readers()}
    return {name: records for name, records in found.items() if records}


def _readers() -> Iterator[tuple[str, str]]:
    for topic in TOPICS.values():
        for consumer in topic.consumers:
            if consumer.mode is not Mode.BROADCAST:
                yield consumer_group(consumer.service, consumer.traffic_class), topic.name


def test_every_consumer_comes_to_the_end_of_its_topics(platform: Platform, published: dict[str, Example]) -> None:
    assert not _behind(platform)


def test_no_service_died_of_an_example(platform: Platform, published: dict[str, Example]) -> None:
    assert {name: process.exit_code for name, process in platform.processes.items()} == dict.fromkeys(platform.processes)


def test_no_example_is_a_dead_letter(platform: Platform, published: dict[str, Example]) -> None:
    known = set(topics(platform))
    letters = [dead_letter_topic(topic.name, consumer.service) for topic in TOPICS.values() for consumer in topic.consumers]
    found = read_all(platform, *(known & set(letters)))
    mine = [record for record in found if record.header("ce_id") in published]
    assert not [(str(published[record.header("ce_id")]), record.header("tessera_dead_letter_message")) for record in mine]


def test_examples_of_questions_are_answered(platform: Platform, published: dict[str, Example]) -> None:
    asked = {event_id: example for event_id, example in published.items() if _is_question(example)}

    def answers() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for record in read_all(platform, "reply"):
            if record.header("ce_correlationid") in asked:
                code = (json.loads(record.value or b"null").get("problem") or {}).get("code", "answered")
                found.setdefault(record.header("ce_correlationid"), set()).add(code)
        assert set(found) == set(asked), [str(asked[missing]) for missing in set(asked) - set(found)]
        return found

    said = eventually_blocking(answers, PATIENCE)
    problems = {
        str(asked[one]): codes - {"answered", SEMANTIC.get((asked[one].event.event_type, asked[one].name))} for one, codes in said.items()
    }
    assert not {name: codes for name, codes in problems.items() if codes}


def _is_question(example: Example) -> bool:
    """Requests that are answered on the reply topic at once; sweeps, validations and generations go on by themselves."""
    commands = {"tessera.sweep.requested.v1", "tessera.validation.requested.v1", "tessera.generation.requested.v1"}
    return "reply_partition" in example.stored["data"] and example.event.event_type not in commands
