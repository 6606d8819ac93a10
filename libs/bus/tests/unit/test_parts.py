"""The registry, the quarantine, topics to be made, refusals: parts that need no server."""

import asyncio
from datetime import UTC, datetime

import pytest

from tessera.bus.deadletters import dead_letter, refusal, told_tenant
from tessera.bus.emitting import Emitter
from tessera.bus.events import Origin
from tessera.bus.publisher import Publisher
from tessera.bus.quarantine import Quarantine
from tessera.bus.registry import Registration, Registry
from tessera.bus.settings import KafkaSettings
from tessera.bus.topics import Wanted, tenant_topics, wanted_topics
from tessera.bus.transaction import Transaction
from tessera.contracts.catalogue import Mode, TrafficClass
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.contracts.events import ArchiveRequested, DocumentPublished, MessagePublished, ModelDeclared, RecallCompleted, TenantChanged


class FakeRecord:
    topic, partition, offset, timestamp, key = "ingest", 2, 9, 0, b"k"

    def __init__(self, value: bytes | None, **attributes: str) -> None:
        self.value = value
        self.headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]


async def handler(event: object, context: object) -> None:
    """Not called."""


def test_a_handler_must_fit_the_catalogue() -> None:
    registry = Registry("memory", TrafficClass.INGESTION)
    with pytest.raises(ValueError, match="MessagePublished is ingestion, transactional for memory, not ingestion, idempotent"):
        registry.add(Registration(MessagePublished, Mode.IDEMPOTENT, handler))
    with pytest.raises(ValueError, match="ModelDeclared is not read for memory"):
        registry.add(Registration(ModelDeclared, Mode.TRANSACTIONAL, handler))
    with pytest.raises(ValueError, match="is bulk"):
        registry.add(Registration(ArchiveRequested, Mode.TRANSACTIONAL, handler))


def test_every_type_on_a_topic_needs_a_handler_and_only_one() -> None:
    registry = Registry("memory", TrafficClass.INGESTION)
    registry.add(Registration(MessagePublished, Mode.TRANSACTIONAL, handler))
    with pytest.raises(ValueError, match="has a handler already"):
        registry.add(Registration(MessagePublished, Mode.TRANSACTIONAL, handler))
    registry.add(Registration(DocumentPublished, Mode.TRANSACTIONAL, handler))
    with pytest.raises(ValueError, match=r"no handler in memory.ingestion for EntityPublished, RelationPublished"):
        registry.topics()


async def test_a_suspect_runs_alone() -> None:
    quarantine, running, seen = Quarantine(), set[str](), list[set[str]]()

    async def work(name: str, suspect: bool) -> None:
        async with quarantine.alone() if suspect else quarantine.together():
            running.add(name)
            await asyncio.sleep(0.01)
            seen.append(set(running))
            running.discard(name)

    await asyncio.gather(work("a", False), work("b", False), work("x", True), work("c", False), work("y", True), work("d", False))
    assert {frozenset(together) for together in seen if {"x", "y"} & together} == {frozenset("x"), frozenset("y")}
    assert len(seen) == 6


def test_topics_come_from_the_catalogue_with_a_dead_letter_topic_per_reader() -> None:
    kafka = KafkaSettings(keyed_partitions=4, minimum_in_sync_replicas=2)
    wanted = {topic.name: topic for topic in wanted_topics(kafka)}
    assert wanted["ingest"].partitions == 4
    assert wanted["reply"].partitions == 32
    assert wanted["tenant.changed"].configuration["cleanup.policy"] == "compact"
    for kept in ("memory.recorded", "ingest.memory.dlq"):
        configuration = wanted[kept].configuration
        assert (configuration["retention.ms"], configuration["retention.bytes"]) == ("-1", "-1")
    assert {"memory.recorded.tokenizer.dlq", "memory.recorded.retention.dlq", "ingest.memory.dlq"} <= set(wanted)
    assert "reply.gateway.dlq" not in wanted
    assert all(topic.configuration["min.insync.replicas"] == "2" for topic in wanted.values())


def test_a_tenant_has_its_own_ingestion_and_refusals() -> None:
    assert [topic.name for topic in tenant_topics("acme", KafkaSettings())] == ["ingest.acme", "refused.acme"]
    assert isinstance(tenant_topics("acme", KafkaSettings())[0], Wanted)


def test_a_dead_letter_keeps_the_record_as_it_came() -> None:
    record = FakeRecord(b"\xff not json", id="m1", tenantid="acme")
    letter = dead_letter(record, "ingest.acme", "memory", InvalidError("data_malformed", "why", "field"), attempts=2)
    headers = dict(letter.encoded.headers)
    assert (letter.topic, letter.key, letter.encoded.value) == ("ingest.memory.dlq", b"k", b"\xff not json")
    assert headers["ce_id"] == b"m1"
    assert headers["tessera_dead_letter_code"] == b"data_malformed"
    assert headers["tessera_dead_letter_topic"] == b"ingest.acme"
    assert headers["tessera_dead_letter_offset"] == b"9"
    again = dead_letter(record, "ingest.acme", "memory", InvalidError("data_malformed", "why"), attempts=3)
    assert again.event_id == letter.event_id


@pytest.mark.parametrize(
    ("topic", "claimed", "code", "told"),
    [
        ("ingest.acme", "other", "tenant_mismatch", "acme"),
        ("ingest", "acme", "data_invalid", "acme"),
        ("ingest", "acme", "tenant_unknown", None),
        ("ingest", "Not A Tenant", "tenant_invalid", None),
    ],
)
def test_a_refusal_goes_to_the_tenant_that_can_be_believed(topic: str, claimed: str, code: str, told: str | None) -> None:
    record = FakeRecord(b"{}", id="m1", tenantid=claimed)
    error = InvalidError(code, "why")
    assert told_tenant(record, topic, error) == told
    assert refusal(record, topic, "memory", error).topic == (f"refused.{told}" if told else "refused")


ORIGIN = Origin(tenant_id="acme", parent_id="m1", request_id="r1", subject_id="s1", reply_partition=4)
CHANGED = TenantChanged(tenant="acme", state="active", changed_at=datetime(2026, 1, 1, tzinfo=UTC))


async def test_a_transaction_derives_ids_and_inherits() -> None:
    rows: list[object] = []
    transaction = Transaction(None, ORIGIN, "memory", rows)  # type: ignore[arg-type]
    first = await transaction.publish(CHANGED, step="a", key=b"key")
    again = await transaction.publish(CHANGED, step="a")
    other = await transaction.publish(CHANGED, step="a", index=1)
    reply = await transaction.reply(RecallCompleted(memories=()))
    assert first == again != other != reply
    headers = dict(rows[0].encoded.headers)  # type: ignore[attr-defined]
    assert (headers["ce_tenantid"], headers["ce_requestid"], headers["ce_subjectid"]) == (b"acme", b"r1", b"s1")
    assert (headers["ce_correlationid"], headers["ce_source"]) == (b"m1", b"/tessera/memory")
    assert [row.partition for row in rows] == [None, None, None, 4]  # type: ignore[attr-defined]
    assert [row.key for row in rows[:2]] == [b"key", b"m1"]  # type: ignore[attr-defined]


async def test_nobody_is_answered_where_nobody_asked() -> None:
    unasked = Origin(tenant_id="acme", parent_id="m1")
    with pytest.raises(InvalidError, match="Nobody asked"):
        await Transaction(None, unasked, "memory", []).reply(CHANGED)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="Nobody asked"):
        await Emitter(Publisher(KafkaSettings(), "x"), unasked, "memory").reply(CHANGED)


async def test_a_producer_without_a_broker_says_so_and_can_be_tried_again() -> None:
    publisher = Publisher(KafkaSettings(bootstrap_servers="127.0.0.1:1", request_timeout_seconds=1), "x")
    for _ in range(2):
        with pytest.raises(RetryableError):
            await publisher.start()
    with pytest.raises(RetryableError, match="not running"):
        await publisher.ping()
    await publisher.stop()
