"""Order, fences, retries, pauses and positions on a real Kafka and a real Postgres."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from tessera.bus import Bus, Origin
from tessera.contracts.errors import InvalidError
from tessera.contracts.events import MessagePublished, ModelDeclared, ModelReference, ServiceControlled, TenantChanged
from tessera.storage import Database
from tessera.testkit import CloudEvent, CloudEventProducer, eventually

pytestmark = pytest.mark.integration

TENANT = {"tenantid": "acme"}


def message(content: str, conversation: str = "c1") -> MessagePublished:
    return MessagePublished(conversation_id=conversation, role="user", content=content)


async def effects(ground: Any) -> list[str]:
    return [row["content"] for row in await ground.rows("SELECT content FROM memory.effect ORDER BY position")]


def applied(ground: Any, *contents: str) -> Callable[[], Any]:
    async def check() -> bool:
        return set(contents) <= set(await effects(ground))

    return check


async def test_the_outbox_keeps_the_order_of_each_key(running: Any, producer: CloudEventProducer, reader: Callable[..., Any]) -> None:
    async with running():
        for number in range(60):
            await producer.publish("ingest", message(str(number), f"c{number % 3}"), id=f"m{number}", partition=0, **TENANT)
        recorded = await reader("memory.recorded").read(60)
    by_key: dict[bytes, list[int]] = {}
    for event in recorded:
        by_key.setdefault(event.key or b"", []).append(int(event.data["text"]))
    assert {key: len(numbers) for key, numbers in by_key.items()} == {b"c0": 20, b"c1": 20, b"c2": 20}
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


async def test_the_position_row_outranks_the_groups_offset(ground: Any, running: Any, producer: CloudEventProducer) -> None:
    async with running():
        for number in range(3):
            await producer.publish("ingest", message(f"a{number}"), id=f"a{number}", partition=0, **TENANT)
        await eventually(applied(ground, "a2"))
    await _set_group_offset(ground, 0)
    async with running():
        await producer.publish("ingest", message("b"), id="b", partition=0, **TENANT)
        await eventually(applied(ground, "b"))
    assert await effects(ground) == ["a0", "a1", "a2", "b"]


async def _set_group_offset(ground: Any, offset: int) -> None:
    partition = TopicPartition(ground.kafka.physical("ingest"), 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=ground.kafka.bootstrap_servers, group_id=ground.kafka.physical("memory.ingestion"))
    await consumer.start()
    consumer.assign([partition])
    await consumer.commit({partition: offset})
    await consumer.stop()


async def test_a_position_that_the_log_no_longer_holds_is_fatal(ground: Any, new_bus: Any) -> None:
    run = new_bus()
    await ground.rows("INSERT INTO memory.consumer_position VALUES ('memory.ingestion', 'ingest', 0, 77)")
    await run.start()
    try:
        await eventually(lambda: run.fatal)
    finally:
        await run.stop()
    assert "events were lost" in run.fatal[0].message


async def test_a_zombie_writes_nothing_once_its_position_was_moved(ground: Any, running: Any, producer: CloudEventProducer) -> None:
    async with running() as run:
        await producer.publish("ingest", message("first"), id="m0", partition=0, **TENANT)
        await eventually(applied(ground, "first"))
        # Another replica has handled the next two events.
        await ground.rows("UPDATE memory.consumer_position SET next_offset = 3 WHERE topic = 'ingest' AND partition = 0")
        for number in range(1, 5):
            await producer.publish("ingest", message(f"later{number}"), id=f"m{number}", partition=0, **TENANT)
        await eventually(applied(ground, "later4"))
        assert run.fatal == []
    assert await effects(ground) == ["first", "later3", "later4"]


async def test_a_retryable_error_repeats_the_batch_and_spends_no_attempt(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running():
        await producer.publish("ingest", message("retry"), id="m0", partition=0, **TENANT)
        await producer.publish("ingest", message("after"), id="m1", partition=0, **TENANT)
        await eventually(applied(ground, "retry", "after"))
        await reader("memory.recorded").read(2)
    assert await effects(ground) == ["retry", "after"]
    assert await ground.rows("SELECT 1 FROM memory.batch_mark") == []


async def test_a_bug_on_one_event_ends_in_the_dead_letters_and_spares_its_neighbours(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running():
        for number, content in enumerate(["before", "bug", "after"]):
            await producer.publish("ingest", message(content), id=f"m{number}", partition=0, **TENANT)
        [letter] = await reader("ingest.memory.dlq").read(1)
        await eventually(applied(ground, "after"))
    assert letter.headers["tessera_dead_letter_code"] == b"handler_failed"
    assert await effects(ground) == ["before", "after"]


async def test_control_pauses_and_resumes_one_consumer(ground: Any, running: Any, producer: CloudEventProducer) -> None:
    async with running() as run:
        ingestion = run.bus.consumer("ingestion")
        ingestion.pause()
        await producer.publish("ingest", message("held"), id="m0", partition=0, **TENANT)
        await eventually(lambda: ingestion.status().lag == 1)
        assert ingestion.status().state == "paused"
        assert await effects(ground) == []
        ingestion.resume()
        await eventually(applied(ground, "held"))
        await eventually(lambda: ingestion.status().lag == 0)
    assert ingestion.status().state == "running"


async def test_two_replicas_share_the_work_and_a_leaving_one_hands_over(ground: Any, running: Any, producer: CloudEventProducer) -> None:
    async with running(instance="one") as one:
        async with running(instance="two") as two:
            await eventually(lambda: all(run.bus.consumer("ingestion").status().partitions == 1 for run in (one, two)))
            for number in range(20):
                await producer.publish("ingest", message(f"a{number}"), id=f"a{number}", partition=number % 2, **TENANT)
            await eventually(applied(ground, *(f"a{number}" for number in range(20))))
        await eventually(lambda: one.bus.consumer("ingestion").status().partitions == 2)
        for number in range(20):
            await producer.publish("ingest", message(f"b{number}"), id=f"b{number}", partition=number % 2, **TENANT)
        await eventually(applied(ground, *(f"b{number}" for number in range(20))))
        assert one.fatal == two.fatal == []
    assert len(await effects(ground)) == 40


async def test_a_job_publishes_with_its_own_transaction_or_not_at_all(
    running: Any, ground: Any, reader: Callable[..., Any], database: Database
) -> None:
    origin = Origin(tenant_id="acme", parent_id="job-1", request_id="r1")
    declared = TenantChanged(tenant="acme", state="active", changed_at="2026-01-01T00:00:00Z")
    async with running() as run:
        with pytest.raises(InvalidError):
            await _change_mind(run.bus, origin, declared)
        async with run.bus.transaction(origin) as transaction:
            kept = await transaction.publish(declared, step="kept")
        seen = await reader("tenant.changed").read(1)
    assert [event.id for event in seen] == [kept]
    assert seen[0].attributes["requestid"] == "r1"


async def _change_mind(bus: Bus, origin: Origin, declared: TenantChanged) -> None:
    async with bus.transaction(origin) as transaction:
        await transaction.publish(declared, step="lost")
        raise InvalidError("changed_mind", "no")


def model(name: str, description: str) -> ModelDeclared:
    reference = ModelReference.model_construct(model_id=name, capability="chat", encoding="cl100k_base", template="plain", exact=True)
    return ModelDeclared.model_construct(model=reference, description=description, owned_by="tests", available=True)


async def test_a_table_gives_what_was_there_and_what_comes(running: Any, probe: Any, producer: CloudEventProducer) -> None:
    seen: list[str] = []

    def register(bus: Bus) -> None:
        probe.register(bus)
        register.table = bus.table(TenantChanged, lambda event: seen.append(event.data.tenant))  # type: ignore[attr-defined]

    async def change(tenant: str) -> None:
        data = TenantChanged(tenant=tenant, state="active", changed_at="2026-01-01T00:00:00Z")
        await producer.publish("tenant.changed", data, key=tenant.encode(), tenantid="platform")

    await change("acme")
    await producer.publish("tenant.changed", {"broken": True}, type=TenantChanged.event_type, key=b"x", tenantid="platform")
    async with running(register=register):
        async with asyncio.timeout(timedelta(seconds=10).total_seconds()):
            await register.table.caught_up()  # type: ignore[attr-defined]
        assert seen == ["acme"]
        await change("second")
        await eventually(lambda: seen == ["acme", "second"])


async def test_publishing_too_much_is_refused_before_it_is_sent(running: Any) -> None:
    async with running() as run:
        huge = model("m", "x" * 1_000_000)
        with pytest.raises(InvalidError) as refused:
            await run.bus.publish(huge, tenant_id="platform")
    assert refused.value.code == "event_too_large"


def types(events: list[CloudEvent]) -> set[str]:
    return {event.type for event in events}


async def test_a_feed_sees_only_what_comes_after_its_start(running: Any, probe: Any, producer: CloudEventProducer) -> None:
    seen: list[str] = []

    def register(bus: Bus) -> None:
        probe.register(bus)
        bus.feed(ServiceControlled, lambda event: seen.append(event.data.action))

    await producer.publish("service.control", ServiceControlled(service="memory", action="pause"), tenantid="platform")
    async with running(register=register):
        await producer.publish("service.control", ServiceControlled(service="memory", action="resume"), tenantid="platform")
        await eventually(lambda: seen == ["resume"])


async def test_a_lost_connection_rolls_back_and_the_batch_is_handled_again(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running():
        await producer.publish("ingest", message("slow2"), id="m0", partition=0, **TENANT)
        await producer.publish("ingest", message("after"), id="m1", partition=0, **TENANT)
        await eventually(lambda: _ended(ground))
        await eventually(applied(ground, "slow2", "after"))
        recorded = await reader("memory.recorded").read(2)
    assert await effects(ground) == ["slow2", "after"]
    assert sorted(event.data["text"] for event in recorded) == ["after", "slow2"]


async def _ended(ground: Any) -> bool:
    """Ends the session whose transaction holds the handler's row."""
    query = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction' "
        "AND query ILIKE '%INSERT INTO effect%'"
    )
    return bool(await ground.rows(query))


async def test_a_batch_cut_off_at_the_drain_deadline_is_not_counted_as_a_death(
    ground: Any, new_bus: Any, producer: CloudEventProducer
) -> None:
    run = new_bus(drain_seconds=0.2)
    await run.start()
    await producer.publish("ingest", message("slow30"), id="m0", partition=0, **TENANT)
    await eventually(lambda: ground.rows("SELECT 1 FROM memory.batch_mark"))
    await run.stop()
    assert await ground.rows("SELECT 1 FROM memory.batch_mark") == []
    assert await effects(ground) == []


_STRANGE_RECORD = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return b"\\xff\\xfe"

async def main():
    producer = AIOKafkaProducer(bootstrap_servers=sys.argv[1])
    await producer.start()
    await producer.send_and_wait(sys.argv[2], b"{}", partition=0, headers=[(Name("x"), b"1")])
    await producer.stop()

asyncio.run(main())
"""
"""Most clients refuse to write a header name that is no UTF-8; aiokafka without its compiled part lets us choose the bytes."""


async def test_a_header_name_that_is_no_text_blocks_nobody(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any]
) -> None:
    async with running():
        await producer.publish("ingest", message("before"), id="m0", partition=0, **TENANT)
        arguments = [ground.kafka.bootstrap_servers, ground.kafka.physical("ingest")]
        environment = {**os.environ, "AIOKAFKA_NO_EXTENSIONS": "1"}
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", _STRANGE_RECORD, *arguments], check=True, env=environment)
        await producer.publish("ingest", message("after"), id="m1", partition=0, **TENANT)
        await eventually(applied(ground, "before", "after"))
        (dead,) = await reader("ingest.memory.dlq").read(1)
    assert dead.headers["\ufffd\ufffd"] == b"1"
