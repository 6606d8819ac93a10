"""CloudEvents in Kafka's binary mode."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus import codec
from tessera.bus.codec import Envelope, decode, encode, is_tenant_id, tenant_of
from tessera.bus.outbox import pack_headers, unpack_headers
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import TOPICS, Topic, catalogued
from tessera.contracts.errors import InvalidError
from tessera.contracts.events import MessagePublished, RecallRequested, TenantChanged
from tessera.contracts.ids import identity_digest
from tessera.contracts.upcasting import Upcasters


@dataclass
class FakeRecord:
    value: bytes | None
    headers: list[tuple[str, bytes]]
    topic: str = "ingest"
    partition: int = 1
    offset: int = 7
    timestamp: int = 1_700_000_000_000
    key: bytes | None = b"key"


@dataclass
class Raw:
    """A message event with single parts to change."""

    data: bytes = b'{"conversation_id":"c","role":"user","content":"hi"}'
    attributes: dict[str, bytes | None] = field(default_factory=dict)

    def record(self) -> FakeRecord:
        given: dict[str, bytes | None] = {
            "specversion": b"1.0",
            "id": b"m1",
            "source": b"/producer",
            "type": MessagePublished.event_type.encode(),
            "tenantid": b"acme",
            **self.attributes,
        }
        return FakeRecord(self.data, [(f"ce_{name}", value) for name, value in given.items() if value is not None])


def refused(record: FakeRecord, name: str = "ingest") -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        decode(record, catalogued(name), name)
    return caught.value


text = st.text(st.characters(exclude_characters="\x00�", exclude_categories=["Cs"]), min_size=1, max_size=60)
moments = st.integers(0, 4_000_000_000_000_000).map(
    lambda microseconds: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
)


@given(
    content=text,
    identifier=text,
    source=text,
    tenant_id=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
    subject_id=st.none() | text,
    request_id=st.none() | text,
    deadline=st.none() | moments,
    sequence=st.none() | st.integers(0, 10**18 - 1),
    time=moments,
)
def test_what_is_encoded_is_decoded_unchanged(content: str, identifier: str, source: str, **attributes: Any) -> None:
    data = MessagePublished(conversation_id="c", role="user", content=content)
    envelope = Envelope(id=identifier, source=source, **attributes)
    encoded = encode(data, envelope)
    event = decode(FakeRecord(encoded.value, encoded.headers), TOPICS["ingest"], "ingest")
    assert event.data == data
    assert (event.id, event.source, event.tenant_id) == (identifier, source, envelope.tenant_id)
    assert (event.subject_id, event.request_id, event.deadline) == (envelope.subject_id, envelope.request_id, envelope.deadline)
    assert (event.sequence, event.time, event.position) == (envelope.sequence, envelope.time, ("ingest", 1, 7))
    assert event.digest == identity_digest(envelope.tenant_id, source, identifier)


@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])), st.binary())))
def test_headers_survive_the_outbox_in_order_with_any_bytes(headers: list[tuple[str, bytes]]) -> None:
    assert unpack_headers(pack_headers(headers)) == headers


@given(st.binary(max_size=200), st.lists(st.tuples(st.sampled_from(["ce_id", "ce_type", "ce_tenantid", "x"]), st.binary(max_size=30))))
def test_nothing_but_an_invalid_error_comes_of_garbage(value: bytes, headers: list[tuple[str, bytes]]) -> None:
    assert refused(FakeRecord(value, headers)).code


@pytest.mark.parametrize(
    ("raw", "code", "where"),
    [
        (Raw(data=b"{"), "data_malformed", None),
        (Raw(data=b""), "data_malformed", None),
        (Raw(data=b"[" * 5_000), "data_malformed", None),
        (Raw(data=b"x" * (900 * 1024 + 1)), "event_too_large", None),
        (Raw(data=b'{"conversation_id":"c","role":"user","content":"hi","typo":1}'), "data_invalid", "typo"),
        (Raw(data=b'{"conversation_id":"c","role":"user","content":""}'), "data_invalid", "content"),
        (Raw(data=b'{"conversation_id":"c","role":"user"}'), "data_invalid", "content"),
        (Raw(data=b'{"conversation_id":"c","role":"king","content":"hi"}'), "data_invalid", "role"),
        (Raw(data=b'{"conversation_id":"c","role":"user","content":"nul \\u0000"}'), "data_invalid", "content"),
        (Raw(attributes={"id": None}), "attribute_missing", "id"),
        (Raw(attributes={"source": None}), "attribute_missing", "source"),
        (Raw(attributes={"specversion": b"0.3"}), "specversion_unsupported", "specversion"),
        (Raw(attributes={"type": b"tessera.unheard.of.v1"}), "event_type_unknown", "type"),
        (Raw(attributes={"tenantid": None}), "tenant_missing", "tenantid"),
        (Raw(attributes={"tenantid": b"Not A Tenant"}), "tenant_invalid", "tenantid"),
        (Raw(attributes={"time": b"yesterday"}), "attribute_invalid", "time"),
        (Raw(attributes={"time": b"2026-01-01T00:00:00"}), "attribute_invalid", "time"),
        (Raw(attributes={"sequence": b"-1"}), "attribute_invalid", "sequence"),
        (Raw(attributes={"subjectid": b"\xff\xfe"}), "attribute_invalid", "subjectid"),
        (Raw(attributes={"subjectid": b"x" * 3_000}), "attribute_invalid", "subjectid"),
    ],
)
def test_each_fault_has_its_code_and_field(raw: Raw, code: str, where: str | None) -> None:
    error = refused(raw.record())
    assert (error.code, error.field) == (code, where)


def test_a_refusal_does_not_repeat_the_content() -> None:
    raw = Raw(data=b'{"conversation_id":"c","role":"my secret","content":"hi"}')
    assert "my secret" not in refused(raw.record()).message


def test_other_content_types_are_refused() -> None:
    record = Raw().record()
    record.headers.append(("content-type", b"application/cloudevents+json; charset=utf-8"))
    assert refused(record).code == "content_type_unsupported"


def test_internal_topics_are_read_open() -> None:
    raw = Raw(data=b'{"query":"q","reply_partition":3,"from_the_future":1}', attributes={"type": RecallRequested.event_type.encode()})
    event = decode(raw.record(), TOPICS["recall.requested"], "recall.requested")
    assert event.origin.reply_partition == 3


@pytest.mark.parametrize("partition", [32, 1_000])
def test_a_reply_partition_that_nobody_can_read_is_none(partition: int) -> None:
    raw = Raw(data=b'{"query":"q","reply_partition":%d}' % partition, attributes={"type": RecallRequested.event_type.encode()})
    assert decode(raw.record(), TOPICS["recall.requested"], "recall.requested").origin.reply_partition is None


def test_a_tenants_own_topic_gives_the_tenant() -> None:
    assert tenant_of({}, "ingest.acme") == "acme"
    assert tenant_of({"tenantid": "acme"}, "ingest.acme") == "acme"
    with pytest.raises(InvalidError) as caught:
        tenant_of({"tenantid": "other"}, "ingest.acme")
    assert caught.value.code == "tenant_mismatch"


@pytest.mark.parametrize(
    ("value", "expected"), [("acme", True), ("a-1_b", True), ("", False), ("-a", False), ("A", False), ("a" * 64, False)]
)
def test_tenant_ids_have_one_form(value: str, expected: bool) -> None:
    assert is_tenant_id(value) is expected


def test_an_event_above_the_limit_is_not_encoded() -> None:
    data = TenantChanged.model_construct(tenant="x" * 1_000_000, state="active", changed_at=datetime.now(UTC) + timedelta(0))
    with pytest.raises(InvalidError) as caught:
        encode(data, Envelope(id="1", source="/s", tenant_id="acme"))
    assert caught.value.code == "event_too_large"


class NoteTaken(EventData):
    """The second version of an event whose first is still in the log."""

    event_type: ClassVar[str] = "tessera.note.taken.v2"
    words: tuple[str, ...]


NOTES = Topic(name="notes", description="Planted.", event_types=(NoteTaken,), key="note", producers=(), consumers=())


def _note(version: int, data: bytes) -> FakeRecord:
    return Raw(data, {"type": f"tessera.note.taken.v{version}".encode()}).record()


@pytest.fixture
def lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Upcasters()
    planted.step("tessera.note.taken.v1")(lambda data: {"words": str(data["note"]).split()})
    monkeypatch.setattr(codec, "UPCASTERS", planted)


@pytest.mark.usefixtures("lifted")
def test_a_former_version_reaches_handlers_as_the_newest() -> None:
    event = decode(_note(1, b'{"note": "a b"}'), NOTES, "memory.recorded")
    assert (event.type, event.data) == ("tessera.note.taken.v2", NoteTaken(words=("a", "b")))


@pytest.mark.usefixtures("lifted")
@pytest.mark.parametrize(
    ("version", "value", "code"), [(1, b"{", "data_malformed"), (1, b"{}", "data_invalid"), (3, b"{}", "event_type_unknown")]
)
def test_what_cannot_be_lifted_is_refused_never_guessed(version: int, value: bytes, code: str) -> None:
    with pytest.raises(InvalidError) as refused:
        decode(_note(version, value), NOTES, "memory.recorded")
    assert refused.value.code == code
