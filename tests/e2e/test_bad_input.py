"""Bad input, over REST and over Kafka: a clear refusal with a code, and the good event behind it arrives as if nothing had been."""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from kafka_records import Stored, produce, read_all

from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PATIENCE = timedelta(seconds=60)
TENANT, NEIGHBOUR = "bad-input", "bad-input-neighbour"
MESSAGE_TYPE = "tessera.message.published.v1"
JSON_TYPE = {"content-type": "application/json"}
ERROR_KEYS = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def key(platform: Platform) -> str:
    return platform.tenant(TENANT)


@pytest.fixture(scope="module")
def neighbour_key(platform: Platform, key: str) -> str:
    return platform.tenant(NEIGHBOUR)


@pytest.fixture(autouse=True)
def _nothing_died(platform: Platform) -> Iterator[None]:
    """Bad input must never end a process."""
    yield
    ended = {name: process.exit_code for name, process in platform.processes.items() if process.exit_code is not None}
    assert not ended, ended


def _message(**changes: Any) -> dict[str, Any]:
    return {"conversation_id": "lamp", "role": "user", "content": "The lamp is lit.", **changes}


def _raw(**changes: str) -> bytes:
    """A message whose fields are given as JSON text, for what no JSON library writes."""
    fields = {"type": '"message"', "conversation_id": '"lamp"', "role": '"user"', "content": '"The lamp is lit."', **changes}
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}").encode()


def _levels(count: int) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for _ in range(count - 1):
        nested = {"in": nested}
    return nested


def _assert_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == ERROR_KEYS
    assert error["code"] == code, error
    assert error["param"] == param, error
    assert error["message"]
    assert "Traceback" not in error["message"]
    assert answer.headers["x-request-id"]


def _state(platform: Platform, key: str, event_id: str) -> dict[str, Any]:
    answer = platform.request("GET", f"/v1/ingest/{event_id}", key=key)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _found(platform: Platform, key: str, query: str, conversation: str) -> list[str]:
    body = {"query": query, "filter": {"conversation_id": conversation}}
    answer = platform.request("POST", "/v1/memories/search", key=key, json=body)
    assert answer.status_code == 200, answer.text
    return [memory["origin_id"] for memory in answer.json()["data"]]


def _assert_arrives(platform: Platform, key: str, event_id: str, conversation: str) -> None:
    """Searchable, and found."""
    eventually_blocking(lambda: _state(platform, key, event_id)["status"] == "searchable", PATIENCE)
    assert event_id in _found(platform, key, "the lamp is lit", conversation)


# --- REST: one route, many bodies -----------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A body that `POST /v1/memories` refuses."""

    name: str
    content: bytes
    code: str
    param: str | None = None
    status: int = 400
    headers: Mapping[str, str] = field(default_factory=lambda: JSON_TYPE)


def _fields(name: str, code: str, param: str | None, **changes: Any) -> Body:
    return Body(name, json.dumps({"type": "message", **_message(**changes)}).encode(), code, param)


BODIES = (
    Body("malformed JSON", b'{"type": "message", ', "invalid_json"),
    Body("no JSON object", b"[1, 2]", "invalid_type"),
    Body("null", b"null", "invalid_type"),
    Body("empty", b"", "missing_required_parameter"),
    Body("another content type", _raw(), "unsupported_media_type", status=415, headers={"content-type": "text/plain"}),
    Body("a form", b"a=b", "unsupported_media_type", status=415, headers={"content-type": "application/x-www-form-urlencoded"}),
    Body("no content type", _raw(), "unsupported_media_type", status=415, headers={}),
    Body("invalid UTF-8", b'{"type": "message", "content": "\xff\xfe"}', "invalid_json"),
    Body("UTF-16", _raw().decode().encode("utf-16"), "invalid_json"),
    Body("U+0000 in the text", _raw(content=r'"lamp\u0000"'), "invalid_value", "content"),
    Body("U+0000 in the id", _raw(id=r'"lamp\u0000"'), "invalid_value", "id"),
    Body("U+0000 in metadata", _raw(metadata=r'{"a": {"b": "\u0000"}}'), "invalid_value", "metadata.a.b"),
    Body("a lone surrogate in the text", _raw(content=r'"lamp \ud800"'), "invalid_value", "content"),
    Body("a lone surrogate in the id", _raw(id=r'"\udfff"'), "invalid_value", "id"),
    Body("a lone surrogate in a name", _raw(**{r"\ud800": "1"}), "invalid_value", "body"),
    Body("objects 5,000 deep", b'{"a": ' * 5_000 + b"1" + b"}" * 5_000, "invalid_json"),
    Body("arrays 200,000 deep", b"[" * 200_000, "invalid_json"),
    _fields("metadata nine deep", "invalid_value", "metadata", metadata=_levels(9)),
    _fields("metadata of 17 KiB", "invalid_value", "metadata", metadata={"a": "x" * 17 * 1024}),
    Body("a number beyond any float", _raw(importance="1e999"), "invalid_value", "importance"),
    Body("a number beyond any float in metadata", _raw(metadata='{"a": 1e999}'), "invalid_value", "metadata"),
    Body("an integer of 5,000 digits", _raw(metadata='{"a": ' + "9" * 5_000 + "}"), "invalid_json"),
    Body("NaN", _raw(importance="NaN"), "invalid_json"),
    Body("NaN in metadata", _raw(metadata='{"a": NaN}'), "invalid_json"),
    Body("Infinity", _raw(importance="-Infinity"), "invalid_json"),
    Body("an unknown kind", _raw(type='"poem"'), "invalid_value", "type"),
    Body("no kind", json.dumps(_message()).encode(), "missing_required_parameter", "type"),
    _fields("100,001 characters", "string_above_max_length", "content", content="x" * 100_001),
    _fields("no characters", "string_below_min_length", "content", content=""),
    _fields("a number for a text", "invalid_type", "content", content=7),
    _fields("a text for a number", "invalid_type", "importance", importance="very"),
    _fields("an importance of 2", "decimal_above_max_value", "importance", importance=2.0),
    _fields("an unknown role", "invalid_value", "role", role="king"),
    _fields("an unknown field", "unknown_parameter", "contnet", contnet="x"),
    _fields("a time without a zone", "invalid_value", "occurred_at", occurred_at="2026-01-01T00:00:00"),
    _fields("an id of 256 characters", "string_above_max_length", "id", id="x" * 256),
)


@pytest.mark.parametrize("bad", BODIES, ids=lambda bad: bad.name)
def test_a_bad_body_is_refused_and_the_next_one_is_taken(platform: Platform, key: str, bad: Body) -> None:
    answer = platform.request("POST", "/v1/memories", key=key, content=bad.content, headers=dict(bad.headers))
    _assert_error(answer, bad.status, bad.code, bad.param)
    good = platform.request("POST", "/v1/memories", key=key, json={"type": "message", **_message()})
    assert good.status_code == 202, good.text


def test_what_was_sent_behind_bad_bodies_is_found(platform: Platform, key: str) -> None:
    conversation, event_id = f"rest-{uuid.uuid4()}", str(uuid.uuid4())
    for bad in BODIES[:8]:
        platform.request("POST", "/v1/memories", key=key, content=bad.content, headers=dict(bad.headers))
    item = {"type": "message", "id": event_id, **_message(conversation_id=conversation)}
    assert platform.request("POST", "/v1/memories", key=key, json=item).status_code == 202
    _assert_arrives(platform, key, event_id, conversation)


def test_a_body_above_one_mebibyte_is_too_large(platform: Platform, key: str) -> None:
    answer = platform.request("POST", "/v1/memories", key=key, content=b" " * (1024 * 1024 + 1), headers=JSON_TYPE)
    _assert_error(answer, 413, "request_too_large")


def test_a_body_of_undeclared_length_is_cut_off_at_one_mebibyte(platform: Platform, key: str) -> None:
    answer = platform.request("POST", "/v1/memories", key=key, content=iter([b" " * 65_536] * 17), headers=JSON_TYPE)
    _assert_error(answer, 413, "request_too_large")


def test_an_event_above_900_kibibytes_is_too_large(platform: Platform, key: str) -> None:
    item = {"type": "document", "document_id": "large", "content": "─" * 310_000}
    answer = platform.request("POST", "/v1/memories", key=key, content=json.dumps(item, ensure_ascii=False).encode(), headers=JSON_TYPE)
    _assert_error(answer, 413, "event_too_large")


def test_a_bad_item_of_a_batch_is_refused_alone(platform: Platform, key: str) -> None:
    good = {"type": "message", **_message()}
    answer = platform.request("POST", "/v1/memories/batch", key=key, json={"items": [good, {**good, "role": "king"}, "no object", good]})
    assert answer.status_code == 202, answer.text
    results = answer.json()["data"]
    assert [result["status"] for result in results] == ["accepted", "refused", "refused", "accepted"]
    assert results[1]["error"]["code"] == "invalid_value"
    assert results[1]["error"]["param"] == "items[1].role"
    assert set(results[2]["error"]) == ERROR_KEYS


# --- REST: many routes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A request that is refused."""

    method: str
    path: str
    status: int
    code: str
    param: str | None = None
    json: Any = None
    content: bytes | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.code}"


_CHAT = "/v1/chat/completions"
_HELLO = [{"role": "user", "content": "hello"}]

CALLS = (
    Call("GET", "/v1/nowhere", 404, "unknown_url"),
    Call("GET", "/", 404, "unknown_url"),
    Call("DELETE", "/v1/memories", 405, "method_not_allowed"),
    Call("GET", "/v1/completions", 405, "method_not_allowed"),
    Call("POST", _CHAT, 404, "model_not_found", json={"model": "no/such", "messages": _HELLO}),
    Call("POST", "/v1/completions", 404, "model_not_found", json={"model": "no/such", "prompt": "hello"}),
    Call("POST", "/v1/embeddings", 404, "model_not_found", json={"model": "no/such", "input": "hello"}),
    Call("GET", "/v1/models/no/such", 404, "model_not_found"),
    Call("POST", _CHAT, 400, "unsupported_model", "model", json={"model": "local/ngram", "messages": _HELLO}),
    Call("POST", _CHAT, 400, "empty_array", "messages", json={"model": "local/quote", "messages": []}),
    Call(
        "POST",
        _CHAT,
        400,
        "invalid_value",
        "messages[0].role",
        json={"model": "local/quote", "messages": [{"role": "king", "content": "x"}]},
    ),
    Call(
        "POST",
        _CHAT,
        400,
        "invalid_value",
        "messages[0].content",
        json={"model": "local/quote", "messages": [{"role": "user", "content": "a\0"}]},
    ),
    Call(
        "POST",
        _CHAT,
        400,
        "invalid_value",
        "messages[0].content",
        content=rb'{"model": "local/quote", "messages": [{"role": "user", "content": "\ud800"}]}',
    ),
    Call("GET", f"{_CHAT}?metadata[a%00]=b", 400, "invalid_value", "metadata"),
    Call("GET", f"{_CHAT}?metadata[a]=%00&metadata[a]=b", 400, "invalid_value", "metadata"),
    Call("GET", f"{_CHAT}?model=%00", 400, "invalid_value", "model"),
    Call("GET", f"{_CHAT}?after=chatcmpl-%00", 400, "invalid_value", "after"),
    Call("GET", f"{_CHAT}/chatcmpl-%00/messages", 400, "invalid_value", "completion_id"),
    Call("POST", f"{_CHAT}/chatcmpl-a", 400, "invalid_value", "metadata", content=rb'{"metadata": {"\u0000": "b"}}'),
    Call("POST", _CHAT, 400, "invalid_value", "safety_identifier", content=rb'{"model": "local/quote", "safety_identifier": "\u0000"}'),
    Call("POST", "/v1/tokenize", 400, "unknown_encoding", "encoding", json={"text": "x", "encoding": "klingon"}),
    Call("POST", "/v1/tokenize", 400, "invalid_value", "text", json={"text": "a\0"}),
    Call("POST", "/v1/detokenize", 400, "unknown_token", "tokens", json={"tokens": [2**31 - 1]}),
    Call("POST", "/v1/detokenize", 404, "composition_not_found", "composition_id", json={"composition_id": "0" * 64}),
    Call("POST", "/v1/memories/search", 400, "invalid_value", "query", content=rb'{"query": "\ud800"}'),
    Call("POST", "/v1/memories/search", 400, "integer_above_max_value", "limit", json={"query": "x", "limit": 101}),
    Call("GET", "/v1/ingest/a%00b", 400, "invalid_value", "event_id"),
    Call("GET", "/v1/retention/sweeps/no-such", 404, "sweep_not_found", "sweep_id"),
    Call("GET", "/v1/retention/sweeps/a%00b", 400, "invalid_value", "sweep_id"),
    Call("GET", "/v1/retention/sweeps/x?limit=many", 400, "invalid_type", "limit"),
    Call("PUT", "/v1/retention/policy", 400, "invalid_value", json={}),
    Call("GET", "/v1/validations/no-such", 404, "validation_not_found", "validation_id"),
    Call("GET", "/v1/validations/a%00b", 400, "invalid_value", "validation_id"),
    Call("POST", "/v1/validations", 404, "dataset_not_found", "dataset", json={"dataset": "no-such"}),
    Call("POST", "/v1/datasets", 400, "missing_required_parameter", "file", json={}),
)

OPERATORS_CALLS = (
    Call("GET", "/v1/tenants?after=%00", 400, "invalid_value", "after"),
    Call("GET", "/v1/keys?after=%00", 400, "invalid_value", "after"),
    Call("DELETE", "/v1/keys/%00", 400, "invalid_value", "key_id"),
    Call("DELETE", "/v1/keys/no-such", 404, "key_not_found"),
    Call("POST", "/v1/tenants", 400, "invalid_value", "id", json={"id": "No Tenant"}),
    Call("POST", "/v1/tenants", 400, "invalid_value", "name", content=rb'{"id": "fine", "name": "\ud800"}'),
    Call("POST", "/v1/tenants", 409, "tenant_exists", "id", json={"id": TENANT}),
    Call("POST", "/v1/keys", 404, "tenant_not_found", json={"tenant_id": "no-such"}),
)


@pytest.mark.parametrize("bad", CALLS, ids=str)
def test_a_bad_request_gets_the_error_object(platform: Platform, key: str, bad: Call) -> None:
    _assert_error(_made(platform, key, bad), bad.status, bad.code, bad.param)


@pytest.mark.parametrize("bad", OPERATORS_CALLS, ids=str)
def test_a_bad_request_of_an_operator_gets_the_error_object(platform: Platform, key: str, bad: Call) -> None:
    _assert_error(_made(platform, "", bad), bad.status, bad.code, bad.param)


def _made(platform: Platform, key: str, call: Call) -> httpx.Response:
    if call.content is not None:
        return platform.request(call.method, call.path, key=key, content=call.content, headers=JSON_TYPE)
    return platform.request(call.method, call.path, key=key, json=call.json)


# --- REST: keys -----------------------------------------------------------------------------------

HEADERS = (
    ("no header", {}, "missing_api_key"),
    ("another scheme", {"Authorization": "Basic dGVzdA=="}, "missing_api_key"),
    ("no key", {"Authorization": "Bearer"}, "invalid_api_key"),
    ("a malformed key", {"Authorization": "Bearer sk-1234"}, "invalid_api_key"),
    ("bytes that are no text", {"Authorization": b"Bearer \xff\xfe"}, "invalid_api_key"),
)


@pytest.mark.parametrize(("headers", "code"), [pytest.param(headers, code, id=name) for name, headers, code in HEADERS])
def test_a_request_without_a_good_key_is_unauthorized(platform: Platform, headers: dict[str, Any], code: str) -> None:
    answer = httpx.get(f"{platform.url}/v1/models", headers=headers, timeout=30)
    _assert_error(answer, 401, code)
    assert answer.headers["www-authenticate"] == ("Bearer" if code == "missing_api_key" else 'Bearer error="invalid_token"')


def test_a_well_formed_key_that_nobody_made_is_refused(platform: Platform) -> None:
    from tessera.gateway.domain import keys  # noqa: PLC0415 - only this test makes a key by itself

    unknown = keys.generate("test").reveal()
    _assert_error(platform.request("GET", "/v1/models", key=unknown), 401, "invalid_api_key")


def test_a_revoked_key_is_refused(platform: Platform, key: str) -> None:
    made = platform.request("POST", "/v1/keys", json={"tenant_id": TENANT}).json()
    assert platform.request("GET", "/v1/models", key=made["key"]).status_code == 200
    assert platform.request("DELETE", f"/v1/keys/{made['id']}").status_code == 204
    _assert_error(platform.request("GET", "/v1/models", key=made["key"]), 401, "invalid_api_key")


def test_an_expired_key_is_refused(platform: Platform, key: str) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=2)
    made = platform.request("POST", "/v1/keys", json={"tenant_id": TENANT, "expires_at": moment.isoformat()})
    assert made.status_code == 201, made.text
    refused = eventually_blocking(lambda: _refusal_of_key(platform, made.json()["key"]), PATIENCE)
    _assert_error(refused, 401, "invalid_api_key")
    assert datetime.now(UTC) >= moment


def _refusal_of_key(platform: Platform, key: str) -> httpx.Response | None:
    answer = platform.request("GET", "/v1/models", key=key)
    return answer if answer.status_code != 200 else None


SCOPED = (
    ("GET", "/v1/models", "inference"),
    ("POST", "/v1/memories", "memory:write"),
    ("POST", "/v1/memories/search", "memory:read"),
    ("GET", "/v1/ingest/x", "memory:read"),
    ("GET", "/v1/retention/policy", "retention"),
    ("GET", "/v1/validations/x", "validation"),
    ("POST", "/v1/tenants", "admin"),
    ("GET", "/v1/keys", "admin"),
    ("GET", "/v1/status", "admin"),
)


@pytest.mark.parametrize(("method", "path", "scope"), SCOPED, ids=str)
def test_a_key_without_the_scope_is_forbidden(platform: Platform, key: str, method: str, path: str, scope: str) -> None:
    others = [known for known in ("inference", "memory:read", "memory:write", "retention", "validation", "admin") if known != scope]
    made = platform.request("POST", "/v1/keys", json={"tenant_id": TENANT, "scopes": others}).json()["key"]
    bodies = {"/v1/memories": {"type": "message", **_message()}, "/v1/memories/search": {"query": "x"}, "/v1/tenants": {"id": "forbidden"}}
    answer = platform.request(method, path, key=made, json=bodies.get(path))
    _assert_error(answer, 403, "missing_scope")
    assert scope in answer.json()["error"]["message"]


# --- Kafka ----------------------------------------------------------------------------------------

Attributes = Mapping[str, bytes | None]


@dataclass(frozen=True)
class Event:
    """A record that memory refuses. `attributes` replace those of a good one; None leaves one out."""

    name: str
    code: str
    param: str | None = None
    value: bytes | None = field(default_factory=lambda: json.dumps(_message()).encode())
    attributes: Attributes = field(default_factory=dict)
    topic: str = "ingest"
    told: str = f"refused.{TENANT}"
    headers: tuple[tuple[str, bytes], ...] | None = None
    """All headers, in place of a good event's."""

    @property
    def owner(self) -> str:
        """The tenant that the topic belongs to, or that a good event on the shared one names."""
        return self.topic.partition(".")[2] or TENANT

    @property
    def has_status(self) -> bool:
        """Whether somebody can ask after it: it belongs to a tenant and has an id."""
        return self.told == f"refused.{TENANT}" and "ce_id" not in self.attributes and self.headers is None


def _data(name: str, param: str | None, **changes: Any) -> Event:
    return Event(name, "data_invalid", param, json.dumps(_message(**changes)).encode())


def _text(name: str, code: str, param: str | None, **changes: str) -> Event:
    fields = {"conversation_id": '"lamp"', "role": '"user"', "content": '"x"', **changes}
    return Event(name, code, param, ("{" + ", ".join(f'"{key}": {text}' for key, text in fields.items()) + "}").encode())


def _attribute(name: str, code: str, param: str, value: bytes | None, told: str = f"refused.{TENANT}") -> Event:
    return Event(name, code, param, attributes={f"ce_{param}": value}, told=told)


EVENTS = (
    Event("malformed JSON", "data_malformed", value=b'{"conversation_id": '),
    Event("no JSON object", "data_invalid", value=b"[1]"),
    Event("no value", "data_malformed", value=None),
    Event("an empty value", "data_malformed", value=b""),
    Event("invalid UTF-8", "data_malformed", value=b'{"content": "\xff\xfe"}'),
    Event("a million brackets", "data_malformed", value=b"[" * 900_000),
    Event("above 900 KiB", "event_too_large", value=json.dumps({"content": "x" * 925_000}).encode()),
    Event("headers above all measure", "event_too_large", attributes={"ce_subjectid": b"x" * 90_000}, value=b" " * 900_000),
    _text("U+0000", "data_invalid", "content", content=r'"lamp\u0000"'),
    _text("a lone surrogate", "data_malformed", None, content=r'"\ud800"'),
    _text("a number beyond any float", "data_invalid", "importance", importance="1e999"),
    _text("NaN", "data_invalid", "importance", importance="NaN"),
    _text("NaN in metadata", "data_invalid", "metadata", metadata='{"a": NaN}'),
    _text("U+0000 in metadata", "data_invalid", "metadata", metadata=r'{"a": "\u0000"}'),
    _text("U+0000 in a name in metadata", "data_invalid", "metadata", metadata=r'{"\u0000": 1}'),
    _text("an integer of 5,000 digits", "data_malformed", None, metadata='{"a": ' + "9" * 5_000 + "}"),
    _data("metadata nine deep", "metadata", metadata=_levels(9)),
    _data("metadata of 17 KiB", "metadata", metadata={"a": "x" * 17 * 1024}),
    _data("100,001 characters", "content", content="x" * 100_001),
    _data("a number for a text", "content", content=7),
    _data("an unknown field", "contnet", contnet="x"),
    Event("a missing field", "data_invalid", "content", value=b'{"conversation_id": "lamp", "role": "user"}'),
    _attribute("an unknown type", "event_type_unknown", "type", b"tessera.poem.published.v1"),
    _attribute("a type of another topic", "event_type_unknown", "type", b"tessera.memory.recorded.v1"),
    _attribute("no type", "attribute_missing", "type", None),
    _attribute("no source", "attribute_missing", "source", None),
    _attribute("no specversion", "attribute_missing", "specversion", None),
    _attribute("another specversion", "specversion_unsupported", "specversion", b"0.3"),
    _attribute("bytes that are no text", "attribute_invalid", "subjectid", b"\xff\xfe"),
    _attribute("an id that is no text", "attribute_invalid", "id", b"\xff\xfe"),
    _attribute("an empty id", "attribute_missing", "id", b""),
    _attribute("no id", "attribute_missing", "id", None),
    _attribute("a source without end", "attribute_invalid", "source", b"/" * 3_000),
    _attribute("no moment", "attribute_invalid", "time", b"yesterday"),
    _attribute("a moment without a zone", "attribute_invalid", "time", b"2026-01-01T00:00:00"),
    _attribute("a deadline that is none", "attribute_invalid", "deadline", b"soon"),
    _attribute("a sequence below 0", "attribute_invalid", "sequence", b"-1"),
    Event("another content type", "content_type_unsupported", "datacontenttype", attributes={"content-type": b"text/plain"}),
    Event(
        "the structured mode", "content_type_unsupported", "datacontenttype", attributes={"content-type": b"application/cloudevents+json"}
    ),
    _attribute("no tenant", "tenant_missing", "tenantid", None, told="refused"),
    _attribute("a tenant that can be none", "tenant_invalid", "tenantid", b"No Tenant!", told="refused"),
    _attribute("an unknown tenant", "tenant_unknown", "tenantid", b"nobody", told="refused"),
    Event("no headers", "attribute_missing", "specversion", headers=(), told="refused"),
    Event("another tenant's topic", "tenant_mismatch", "tenantid", topic=f"ingest.{NEIGHBOUR}", told=f"refused.{NEIGHBOUR}"),
)


def _headers(event_id: str, changes: Attributes) -> list[tuple[str, bytes]]:
    good = {
        "ce_specversion": b"1.0",
        "ce_id": event_id.encode(),
        "ce_source": b"/bad-input",
        "ce_type": MESSAGE_TYPE.encode(),
        "ce_time": b"2026-01-01T00:00:00Z",
        "ce_tenantid": TENANT.encode(),
        "content-type": b"application/json",
    }
    return [(name, value) for name, value in {**good, **changes}.items() if value is not None]


@dataclass(frozen=True)
class Sent:
    """A bad event and the good one behind it, on the same key."""

    bad_id: str
    good_id: str
    conversation: str
    headers: Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Aftermath:
    """What Kafka holds once every good event has arrived."""

    sent: Mapping[str, Sent]
    letters: Sequence[Stored]
    refusals: Mapping[str, Sequence[dict[str, Any]]]

    def letter(self, key: str) -> Stored:
        """The dead letter of the one bad event with this key."""
        (found,) = [letter for letter in self.letters if letter.key == key.encode()]
        return found

    def told(self, topic: str, letter: Stored) -> dict[str, Any]:
        """What the producers of this dead letter read."""
        (found,) = [told for told in self.refusals[topic] if _place(told) == _place_of(letter)]
        return found


def _place(told: Mapping[str, Any]) -> tuple[str, int, int]:
    return told["topic"], told["partition"], told["offset"]


def _place_of(letter: Stored) -> tuple[str, int, int]:
    name = "tessera_dead_letter_"
    return letter.header(f"{name}topic"), int(letter.header(f"{name}partition")), int(letter.header(f"{name}offset"))


def _refusals(platform: Platform, topic: str) -> list[dict[str, Any]]:
    return [json.loads(record.value or b"null") for record in read_all(platform, topic)]


def _send(platform: Platform, bad: Event) -> Sent:
    bad_id, good_id, conversation = str(uuid.uuid4()), str(uuid.uuid4()), f"kafka-{uuid.uuid4()}"
    headers = list(bad.headers) if bad.headers is not None else _headers(bad_id, bad.attributes)
    produce(platform, bad.topic, bad.value, headers, conversation.encode())
    good = json.dumps(_message(conversation_id=conversation)).encode()
    produce(platform, bad.topic, good, _headers(good_id, {"ce_tenantid": bad.owner.encode()}), conversation.encode())
    return Sent(bad_id, good_id, conversation, headers)


@pytest.fixture(scope="module")
def aftermath(platform: Platform, key: str, neighbour_key: str) -> Aftermath:
    """All bad events at once, each with a good one behind it; waits until every good one has arrived."""
    keys = {TENANT: key, NEIGHBOUR: neighbour_key}
    sent = {bad.name: _send(platform, bad) for bad in EVENTS}
    for bad in EVENTS:
        good_id = sent[bad.name].good_id
        eventually_blocking(lambda: _state(platform, keys[bad.owner], good_id)["status"] == "searchable", PATIENCE)  # noqa: B023
    topics = {bad.told for bad in EVENTS}

    def all_told() -> Aftermath:
        refusals = {topic: _refusals(platform, topic) for topic in topics}
        known = {_place(told) for found in refusals.values() for told in found}
        letters = read_all(platform, "ingest.memory.dlq")
        mine = [letter for letter in letters if letter.key in {one.conversation.encode() for one in sent.values()}]
        kept = {letter.key for letter in mine}
        assert not [name for name, one in sent.items() if one.conversation.encode() not in kept], "without a dead letter"
        assert {_place_of(letter) for letter in mine} <= known
        return Aftermath(sent, mine, refusals)

    return eventually_blocking(all_told, PATIENCE)


@pytest.mark.parametrize("bad", EVENTS, ids=lambda bad: bad.name)
def test_a_bad_event_is_kept_for_operators_as_it_came(aftermath: Aftermath, bad: Event) -> None:
    sent = aftermath.sent[bad.name]
    letter = aftermath.letter(sent.conversation)
    assert (letter.value or b"") == (bad.value or b"")
    assert all(letter.headers[name] == value for name, value in sent.headers)
    assert letter.header("tessera_dead_letter_code") == bad.code


@pytest.mark.parametrize("bad", EVENTS, ids=lambda bad: bad.name)
def test_a_bad_event_is_told_to_its_producer(aftermath: Aftermath, bad: Event) -> None:
    reason = aftermath.told(bad.told, aftermath.letter(aftermath.sent[bad.name].conversation))["reason"]
    assert (reason["code"], reason.get("param")) == (bad.code, bad.param), reason


@pytest.mark.parametrize("bad", [bad for bad in EVENTS if bad.has_status], ids=lambda bad: bad.name)
def test_a_bad_event_with_an_id_has_a_status(platform: Platform, key: str, aftermath: Aftermath, bad: Event) -> None:
    state = _state(platform, key, aftermath.sent[bad.name].bad_id)
    assert (state["status"], state["reason"]["code"]) == ("refused", bad.code)


@pytest.mark.parametrize("bad", EVENTS, ids=lambda bad: bad.name)
def test_a_good_event_behind_a_bad_one_is_found(platform: Platform, key: str, neighbour_key: str, aftermath: Aftermath, bad: Event) -> None:
    sent = aftermath.sent[bad.name]
    found = _found(platform, neighbour_key if bad.owner == NEIGHBOUR else key, "the lamp is lit", sent.conversation)
    assert found == [sent.good_id]


def test_an_event_just_below_900_kibibytes_is_taken(platform: Platform, key: str) -> None:
    event_id = str(uuid.uuid4())
    # Each space is written as six bytes: a large record, and a short document to index.
    value = b'{"document_id": "large", "content": "The lamp is lit.' + rb"\u0020" * 152_000 + b'"}'
    assert 890 * 1024 < len(value) < 900 * 1024
    produce(platform, "ingest", value, _headers(event_id, {"ce_type": b"tessera.document.published.v1"}), event_id.encode())
    eventually_blocking(lambda: _state(platform, key, event_id)["status"] in {"applied", "searchable"}, PATIENCE)


def test_a_repeated_event_changes_nothing(platform: Platform, key: str) -> None:
    conversation, event_id = f"repeat-{uuid.uuid4()}", str(uuid.uuid4())
    value = json.dumps(_message(conversation_id=conversation)).encode()
    for _ in range(3):
        produce(platform, "ingest", value, _headers(event_id, {}), conversation.encode())
    _behind(platform, key, conversation)
    assert _found(platform, key, "the lamp is lit", conversation).count(event_id) == 1
    assert _state(platform, key, event_id)["status"] == "searchable"
    assert not _letters(platform, conversation)


def test_a_reused_id_with_another_body_is_refused_and_the_first_stands(platform: Platform, key: str) -> None:
    conversation, event_id = f"reuse-{uuid.uuid4()}", str(uuid.uuid4())
    for content in ("The lamp is lit.", "The lamp is dark."):
        value = json.dumps(_message(conversation_id=conversation, content=content)).encode()
        produce(platform, "ingest", value, _headers(event_id, {}), conversation.encode())
    _behind(platform, key, conversation)
    letters = _letters(platform, conversation)
    assert [letter.header("tessera_dead_letter_code") for letter in letters] == ["event_id_reused"]
    told = [refusal for refusal in _refusals(platform, f"refused.{TENANT}") if refusal["refused_id"] == event_id]
    assert [refusal["reason"]["code"] for refusal in told] == ["event_id_reused"]
    assert _state(platform, key, event_id)["status"] == "searchable", "the first one is not undone by the second"


def test_a_reused_id_over_rest_is_told_too(platform: Platform, key: str) -> None:
    conversation, event_id = f"rest-reuse-{uuid.uuid4()}", str(uuid.uuid4())
    for content in ("The lamp is lit.", "The lamp is dark."):
        item = {"type": "message", "id": event_id, **_message(conversation_id=conversation, content=content)}
        assert platform.request("POST", "/v1/memories", key=key, json=item).status_code == 202

    def told() -> bool:
        told = [refusal for refusal in _refusals(platform, f"refused.{TENANT}") if refusal["refused_id"] == event_id]
        return [refusal["reason"]["code"] for refusal in told] == ["event_id_reused"]

    eventually_blocking(told, PATIENCE)
    _assert_arrives(platform, key, event_id, conversation)


def _letters(platform: Platform, conversation: str) -> list[Stored]:
    return [letter for letter in read_all(platform, "ingest.memory.dlq") if letter.key == conversation.encode()]


def _behind(platform: Platform, key: str, conversation: str) -> None:
    """A good event on the same key: once it has arrived, all before it was handled."""
    event_id = str(uuid.uuid4())
    value = json.dumps(_message(conversation_id=conversation)).encode()
    produce(platform, "ingest", value, _headers(event_id, {}), conversation.encode())
    _assert_arrives(platform, key, event_id, conversation)
