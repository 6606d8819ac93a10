import pytest

from tessera.contracts import EVENT_TYPES, TOPICS, Mode, topic_of
from tessera.contracts.catalogue import (
    SERVICES,
    catalogued,
    consumed_by,
    consumer_group,
    dead_letter_topic,
    ingestion_topic,
    produced_by,
    refusal_topic,
    tenant_of_topic,
)

pytestmark = pytest.mark.unit


def test_every_event_travels_on_exactly_one_topic() -> None:
    carried = [event for topic in TOPICS.values() for event in topic.event_types]
    assert len(carried) == len(set(carried)) == len(EVENT_TYPES)
    assert all(event in topic_of(event).event_types for event in carried)


def test_every_service_produces_and_consumes() -> None:
    assert all(consumed_by(service) and produced_by(service) for service in SERVICES)


def test_everyone_named_is_a_service() -> None:
    named = {consumer.service for topic in TOPICS.values() for consumer in topic.consumers}
    named |= {producer for topic in TOPICS.values() for producer in topic.producers}
    assert named == {*SERVICES, "producers"}


def test_the_log_of_record_is_kept() -> None:
    assert TOPICS["memory.recorded"].retention is None
    assert not TOPICS["memory.recorded"].compacted


def test_names_of_a_tenants_topics() -> None:
    assert ingestion_topic("acme") == "ingest.acme"
    assert (refusal_topic("acme"), refusal_topic(None)) == ("refused.acme", "refused")
    assert catalogued("ingest.acme") is TOPICS["ingest"]
    assert (tenant_of_topic("ingest.acme"), tenant_of_topic("ingest")) == ("acme", None)
    assert dead_letter_topic("ingest.acme", "memory") == "ingest.memory.dlq"
    assert consumer_group("memory", "chat") == "memory.chat"


@pytest.mark.parametrize("name", ["nothing", "generation.requested.acme", "recall.acme"])
def test_an_unknown_topic_is_not_guessed(name: str) -> None:
    with pytest.raises(KeyError):
        catalogued(name)


def test_order_bound_topics_are_not_order_free() -> None:
    assert not any(TOPICS[name].order_free for name in ("ingest", "memory.recorded", "memory.changed", "reply"))


def test_broadcast_topics_have_no_group_semantics_mixed_in() -> None:
    for topic in TOPICS.values():
        modes = {consumer.mode for consumer in topic.consumers}
        assert Mode.BROADCAST not in modes or modes == {Mode.BROADCAST}
