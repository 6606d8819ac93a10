"""The mode transactional on a real Kafka and a real Postgres."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tessera.contracts.events import MessagePublished
from tessera.testkit import CloudEventProducer, eventually

pytestmark = pytest.mark.integration

TENANT = {"tenantid": "acme"}


def message(content: str, conversation: str = "c1") -> MessagePublished:
    return MessagePublished(conversation_id=conversation, role="user", content=content)


async def effects(ground: Any) -> list[str]:
    return [row["content"] for row in await ground.rows("SELECT content FROM memory.effect ORDER BY position")]


async def test_an_event_has_its_row_its_event_its_position_and_its_offset(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running():
        written = await producer.publish("ingest", message("hello"), id="m1", partition=0, requestid="r1", **TENANT)
        [recorded] = await reader("memory.recorded").read(1)
        assert await effects(ground) == ["hello"]
        [position] = await ground.rows("SELECT * FROM memory.consumer_position WHERE topic = 'ingest' AND partition = 0")
        assert position["next_offset"] == written.offset + 1
    assert recorded.data["text"] == "hello"
    assert recorded.attributes["tenantid"] == "acme"
    assert recorded.attributes["requestid"] == "r1"
    assert recorded.attributes["correlationid"] == "m1"
    assert await ground.rows("SELECT * FROM memory.outbox") == []
    assert await ground.rows("SELECT * FROM memory.batch_mark") == []


async def test_a_producers_repeat_has_no_second_effect(ground: Any, running: Any, producer: CloudEventProducer) -> None:
    async with running():
        for _ in range(3):
            await producer.publish("ingest", message("once"), id="m1", **TENANT)
        await producer.publish("ingest", message("last"), id="m2", **TENANT)
        await eventually(lambda: _contains(ground, "last"))
        positions = await eventually(lambda: _positions(ground, 4))
    assert sum(positions) == 4
    assert sorted(await effects(ground)) == ["last", "once"]


async def _contains(ground: Any, content: str) -> bool:
    return content in await effects(ground)


async def _positions(ground: Any, total: int) -> list[int]:
    rows = await ground.rows("SELECT next_offset FROM memory.consumer_position WHERE topic = 'ingest'")
    found = [row["next_offset"] for row in rows]
    return found if sum(found) >= total else []


async def test_invalid_events_are_told_and_kept_and_the_others_go_on(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running() as run:
        await run.bus.ensure_tenant_topics("acme")
        await producer.publish("ingest", message("first"), id="m1", partition=0, **TENANT)
        await producer.publish("ingest", message("invalid"), id="m2", partition=0, **TENANT)
        await producer.publish("ingest", b"{not json", type="tessera.message.published.v1", id="m3", partition=0, **TENANT)
        typo = {"conversation_id": "c", "role": "user", "content": "x", "typo": 1}
        await producer.publish("ingest", typo, type="tessera.message.published.v1", id="m4", partition=0, **TENANT)
        await producer.publish("ingest", message("again"), id="m1", partition=0, **TENANT)
        await producer.publish("ingest", message("last"), id="m5", partition=0, **TENANT)
        refused = await reader("refused.acme").read(4)
        letters = await reader("ingest.memory.dlq").read(4)
        await eventually(lambda: _contains(ground, "last"))
    assert await effects(ground) == ["first", "last"]
    reasons = {event.data["refused_id"]: event.data["reason"] for event in refused}
    assert {name: reason["code"] for name, reason in reasons.items()} == {
        "m1": "event_id_reused",
        "m2": "not_wanted",
        "m3": "data_malformed",
        "m4": "data_invalid",
    }
    assert reasons["m4"]["param"] == "typo"
    assert reasons["m2"]["param"] == "content"
    malformed = next(letter for letter in letters if letter.id == "m3")
    assert malformed.data == b"{not json"
    assert malformed.headers["tessera_dead_letter_code"] == b"data_malformed"


async def test_events_without_a_known_tenant_are_refused_on_the_shared_topic(
    running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running():
        await producer.publish("ingest", message("whose?"), id="m1")
        [refused] = await reader("refused").read(1)
    assert refused.data["reason"]["code"] == "tenant_missing"


async def test_a_new_tenants_topic_is_found_and_a_foreign_tenant_is_refused(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running() as run:
        await run.bus.ensure_tenant_topics("acme")
        await producer.publish("ingest.acme", message("mine"), id="m1")
        await producer.publish("ingest.acme", message("foreign"), id="m2", tenantid="other")
        await eventually(lambda: _contains(ground, "mine"), timeout=30)
        [refused] = await reader("refused.acme").read(1)
    assert refused.data["reason"]["code"] == "tenant_mismatch"
    assert await effects(ground) == ["mine"]
    assert json.loads(json.dumps(refused.data))["topic"] == "ingest.acme"
