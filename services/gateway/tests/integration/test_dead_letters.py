"""Dead letters over REST, on a real gateway; the letters are written as a service's consumer writes them."""

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from tessera.bus.deadletters import dead_letter
from tessera.contracts.errors import InvalidError
from tessera.contracts.events import AuditRecorded, DependencyStatus, ServiceStatus
from tessera.testkit import eventually_blocking

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

TYPE = b"tessera.message.published.v1"
TRACE = "0af7651916cd43dd8448eb211c80319c"  # pragma: allowlist secret - the example of W3C Trace Context


@dataclass(frozen=True)
class Refused:
    """An event as a consumer met it."""

    headers: Sequence[tuple[str, bytes]]
    value: bytes | None
    key: bytes | None = b"conversation"
    partition: int = 1
    offset: int = 7
    timestamp: int = 0
    topic: str = ""


@dataclass(frozen=True)
class Log:
    """Kafka as a stranger meets it."""

    gateway: Any

    def bury(self, refused: Refused, topic: str = "ingest", service: str = "memory", code: str = "tenant_unknown") -> str:
        """Writes the dead letter of an event; its id."""
        row = dead_letter(refused, topic, service, InvalidError(code, "Why it was refused.", "tenantid"), 2)
        places: list[int] = []
        producer = Producer({"bootstrap.servers": self.gateway.peer.servers})
        name = self.gateway.peer.prefix + row.topic
        producer.produce(
            name, row.encoded.value, row.key, headers=row.encoded.headers, on_delivery=lambda _, sent: places.append(sent.offset())
        )
        assert producer.flush(30) == 0
        return f"{row.topic}:0:{places[0]}"

    def on(self, topic: str, partition: int) -> list[Any]:
        """Every record of a partition."""
        consumer = Consumer({"bootstrap.servers": self.gateway.peer.servers, "group.id": "unused", "enable.auto.commit": False})
        try:
            place = TopicPartition(self.gateway.peer.prefix + topic, partition, 0)
            low, high = consumer.get_watermark_offsets(place, timeout=30)
            consumer.assign([place])
            found: list[Any] = []
            eventually_blocking(lambda: found.extend(consumer.consume(100, 0.2)) or len(found) >= high - low, 30)
            return found
        finally:
            consumer.close()


@pytest.fixture
def log(gateway: Any) -> Log:
    return Log(gateway)


@pytest.fixture
def http(gateway: Any) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


@pytest.fixture
def name() -> str:
    """The event's id: filters by it keep tests apart."""
    return str(uuid4())


def event(name: str, value: bytes | None = b"{}", **more: Any) -> Refused:
    headers = [("ce_id", name.encode()), ("ce_type", TYPE), ("ce_tenantid", b"default"), ("x-odd", b"\xff\x00"), ("x-odd", b"twice")]
    return Refused([*headers, ("ce_traceparent", f"00-{TRACE}-b7ad6b7169203331-01".encode())], value, **more)


def listed(http: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    answer = http.get("/v1/dead-letters", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def order(http: httpx.Client, action: str, **body: Any) -> list[tuple[str, str]]:
    answer = http.post(f"/v1/dead-letters/{action}", json=body)
    assert answer.status_code == 200, answer.text
    return [(one["id"], one["result"]) for one in answer.json()["data"]]


def test_a_letter_is_shown_byte_for_byte(http: httpx.Client, log: Log, name: str) -> None:
    value = b'{"content": "The lamp is lit."}'
    letter_id = log.bury(event(name, value))
    shown = http.get(f"/v1/dead-letters/{letter_id}").json()
    assert base64.b64decode(shown["value"]["base64"]) == value
    assert (shown["value"]["text"], shown["value"]["json"]) == (value.decode(), json.loads(value))
    assert (base64.b64decode(shown["key"]["base64"]), shown["key"]["text"]) == (b"conversation", "conversation")
    assert [(header["name"], base64.b64decode(header["base64"])) for header in shown["headers"]] == list(event(name).headers)
    expected = {
        "id": letter_id,
        "status": "pending",
        "service": "memory",
        "topic": "ingest",
        "partition": 1,
        "offset": 7,
        "code": "tenant_unknown",
        "message": "Why it was refused.",
        "field": "tenantid",
        "error": "InvalidError",
        "attempts": 2,
        "replays": 0,
        "tenant_id": "default",
        "event_id": name,
        "event_type": TYPE.decode(),
        "trace_id": TRACE,
        "size_bytes": len(value),
        "decided_at": None,
    }
    assert {field: shown[field] for field in expected} == expected
    (summary,) = listed(http, event_id=name)
    assert summary == {field: shown[field] for field in summary}


@pytest.mark.parametrize("value", [b"\xff\xfe\x00", b"", b"[1e999]", b"[" * 300 + b"]" * 300, b'"\\ud800"', b"NaN", None], ids=repr)
def test_bytes_that_are_no_text_or_no_sound_json_are_shown_all_the_same(http: httpx.Client, log: Log, name: str, value: bytes) -> None:
    shown = http.get(f"/v1/dead-letters/{log.bury(event(name, value))}").json()
    assert base64.b64decode(shown["value"]["base64"]) == (value or b"")
    assert shown["value"]["json"] is None


@pytest.mark.parametrize("letter_id", ["ingest.memory.dlq:0:999999", "ingest.memory.dlq:7:0", "ingest:0:0", "nothing"])
def test_a_letter_that_does_not_exist_is_404(http: httpx.Client, letter_id: str) -> None:
    missing = http.get(f"/v1/dead-letters/{letter_id}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "dead_letter_not_found")
    assert order(http, "discard", ids=[letter_id]) == [(letter_id, "not_found")]


def test_letters_are_found_by_what_is_known_of_them(http: httpx.Client, log: Log, name: str) -> None:
    mine = log.bury(event(name))
    other = log.bury(event(name, offset=8), "memory.recorded", "retention", "data_invalid")
    refused_at = {letter["id"]: letter["refused_at"] for letter in listed(http, event_id=name)}
    assert list(refused_at) == [other, mine], "the newest first"

    def found(**query: Any) -> list[str]:
        return [letter["id"] for letter in listed(http, event_id=name, **query)]

    assert found(order="oldest") == [mine, other]
    assert found(topic="ingest") == found(service="memory") == found(code="tenant_unknown") == [mine]
    assert found(until=refused_at[other]) == [mine]
    assert found(since=refused_at[other]) == [other]
    assert found(tenant_id="default") == [other, mine]
    assert found(tenant_id="acme") == found(topic="ingest.acme") == found(topic="ingest", service="generator") == []


def test_pages_hold_each_letter_once(http: httpx.Client, log: Log, name: str) -> None:
    buried = [log.bury(event(name, offset=number)) for number in range(5)]
    found: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        page = http.get("/v1/dead-letters", params={"event_id": name, "limit": 2, **after}).json()
        found += [letter["id"] for letter in page["data"]]
        after = {"after": page["next_cursor"]}
        assert page["has_more"] is (len(found) < 5)
    assert found == buried[::-1]


def test_a_replay_is_the_event_again_and_happens_once(http: httpx.Client, log: Log, name: str) -> None:
    letter_id = log.bury(event(name, b"\xff no text"))
    before = len(log.on("ingest", 1))
    assert order(http, "replay", ids=[letter_id], dry_run=True) == [(letter_id, "would_be_replayed")]
    assert len(log.on("ingest", 1)) == before, "a dry run changes nothing"
    assert order(http, "replay", ids=[letter_id, letter_id]) == [(letter_id, "replayed")]
    assert order(http, "replay", ids=[letter_id]) == [(letter_id, "already_replayed")]
    assert order(http, "discard", ids=[letter_id]) == [(letter_id, "already_replayed")]
    (again,) = log.on("ingest", 1)[before:]
    assert (again.value(), again.key()) == (b"\xff no text", b"conversation")
    assert again.headers() == [*event(name).headers, ("tessera_replay_attempt", b"1")]
    assert listed(http, event_id=name) == []
    (decided,) = listed(http, event_id=name, status="replayed")
    assert decided["decided_at"]
    assert decided["decided_by"] in {key["id"] for key in http.get("/v1/keys").json()["data"]}


def test_a_copy_of_a_decided_letter_is_decided_too(http: httpx.Client, log: Log, name: str) -> None:
    first, copy = log.bury(event(name)), log.bury(event(name))
    assert order(http, "discard", ids=[first]) == [(first, "discarded")]
    assert order(http, "replay", ids=[copy]) == [(copy, "already_discarded")]


def test_discarded_letters_vanish_from_the_list_and_others_are_untouched(http: httpx.Client, log: Log, name: str) -> None:
    gone, kept = log.bury(event(name)), log.bury(event(name, offset=8), code="data_invalid")
    wanted = {"event_id": name, "code": "tenant_unknown"}
    assert order(http, "discard", filter=wanted, dry_run=True) == [(gone, "would_be_discarded")]
    assert [letter["id"] for letter in listed(http, event_id=name)] == [kept, gone], "a dry run changes nothing"
    assert order(http, "discard", filter=wanted) == [(gone, "discarded")]
    assert order(http, "discard", filter=wanted) == []
    assert [letter["id"] for letter in listed(http, event_id=name)] == [kept]
    assert [(letter["id"], letter["status"]) for letter in listed(http, event_id=name, status="all")] == [
        (kept, "pending"),
        (gone, "discarded"),
    ]
    assert http.get(f"/v1/dead-letters/{gone}").json()["status"] == "discarded"


def test_a_filter_goes_through_all_in_the_order_of_the_log(http: httpx.Client, log: Log, name: str) -> None:
    buried = [log.bury(event(name, str(number).encode(), offset=number)) for number in range(5)]
    before = len(log.on("ingest", 1))
    done: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        page = http.post("/v1/dead-letters/replay", json={"filter": {"event_id": name}, "limit": 2, **after}).json()
        done += [one["id"] for one in page["data"]]
        after = {"after": page["next_cursor"]}
    assert (done, page["has_more"]) == (buried, False)
    assert [record.value() for record in log.on("ingest", 1)[before:]] == [b"0", b"1", b"2", b"3", b"4"]


def test_one_that_cannot_be_replayed_does_not_stop_the_others(http: httpx.Client, log: Log, name: str) -> None:
    nowhere = log.bury(event(name), "ingest.never-made")
    forged = log.bury(event(name, offset=8), "archive.requested")
    good = log.bury(event(name, offset=9))
    answer = http.post("/v1/dead-letters/replay", json={"ids": [nowhere, forged, good]}).json()
    results = {one["id"]: (one["result"], one["error"] and one["error"]["code"]) for one in answer["data"]}
    assert results == {nowhere: ("failed", "topic_missing"), forged: ("replayed", None), good: ("replayed", None)}
    assert answer["counts"] == {"failed": 1, "replayed": 2}
    assert [letter["id"] for letter in listed(http, event_id=name)] == [nowhere]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", None),
        ({"ids": ["x"], "filter": {}}, "invalid_value", None),
        ({"ids": []}, "empty_array", "ids"),
        ({"filter": {"topic": "nothing"}}, "invalid_value", "topic"),
        ({"filter": {"service": "nobody"}}, "invalid_value", "filter.service"),
        ({"filter": {"since": "2026-01-01T00:00:00"}}, "invalid_value", "filter.since"),
        ({"filter": {}, "after": "x"}, "invalid_value", "after"),
        ({"filter": {"cod": "x"}}, "unknown_parameter", "filter.cod"),
        ({"ids": ["x"], "dry_run": "yes"}, "invalid_type", "dry_run"),
    ],
)
def test_an_order_that_means_nothing_is_refused(http: httpx.Client, body: dict[str, Any], code: str, param: str | None) -> None:
    refused = http.post("/v1/dead-letters/replay", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, code), error
    assert param is None or error["param"] == param


def test_a_gateway_that_dies_before_it_remembers_leaves_the_letter_pending(gateway: Any, log: Log, name: str) -> None:
    """The replay is then repeated, with the same id; whoever applied it knows it (libs/bus/tests/integration/test_letters.py).

    That the first one was begun is on record, and stays so.
    """
    letter_id = log.bury(event(name))
    before = len(log.on("ingest", 1))
    gateway.process.stop()
    gateway.process.override(TESSERA_GATEWAY__CRASH_POINT="replayed_before_remembered")
    gateway.process.start()
    try:
        gateway.process.wait_ready()
        with gateway.http() as http, suppress(httpx.TransportError):
            http.post("/v1/dead-letters/replay", json={"ids": [letter_id]})
        eventually_blocking(lambda: gateway.process.exit_code == -9)
    finally:
        gateway.process.stop()
        gateway.process.override(TESSERA_GATEWAY__CRASH_POINT="")
        gateway.process.start()
        gateway.process.wait_ready()
    with gateway.http() as http:
        assert [letter["status"] for letter in listed(http, event_id=name)] == ["pending"]
        assert order(http, "replay", ids=[letter_id]) == [(letter_id, "replayed")]
    first, second = log.on("ingest", 1)[before:]
    assert (first.value(), first.key(), first.headers()) == (second.value(), second.key(), second.headers())
    outcomes = eventually_blocking(lambda: found if len(found := recorded(gateway, letter_id)) >= 3 else None)
    assert outcomes == ["attempted", "attempted", "succeeded"]


def recorded(gateway: Any, letter_id: str) -> list[str]:
    """What came of orders about a letter, in the order of the audit trail."""
    target = {"kind": "dead_letter", "id": letter_id}
    return [heard.data["outcome"] for heard in gateway.peer.of(AuditRecorded) if heard.data.get("target") == target]


def test_a_breaker_that_is_open_is_in_the_status_of_its_replica(gateway: Any, http: httpx.Client) -> None:
    broken = DependencyStatus(name="embedder", required=False, healthy=False, breaker="open")
    now = datetime.now(UTC)
    fields = {"service": "memory", "instance": "m-1", "state": "degraded", "version": "1", "started_at": now, "reported_at": now}
    gateway.peer.say(ServiceStatus(**fields, dependencies=(broken,), consumers=()), key=b"memory/m-1")

    def breakers(service: str) -> dict[str, str]:
        (found,) = [each for each in http.get("/v1/status").json()["services"] if each["service"] == service]
        return {one["name"]: one["breaker"] for replica in found["replicas"] for one in replica["dependencies"]}

    assert eventually_blocking(lambda: breakers("memory")) == {"embedder": "open"}
    own = eventually_blocking(lambda: breakers("gateway"))
    assert (own["publishing"], own["postgres"]) == ("closed", "closed")
    measured = gateway.process.get_admin("/metrics")[1]
    assert 'tessera_breaker_open{dependency="publishing"} 0.0' in measured
