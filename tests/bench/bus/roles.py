"""The processes under measurement: `python roles.py ROLE`. Everything they need is in the environment.

service   the bus with inbox, state, outbox, position and relay; also answers requests
copy      the floor of throughput: the same rows by COPY, without Kafka
consume   raw aiokafka: getmany and validation, no effect
effect    the floor of latency: one aiokafka hop and one commit
echo      the floor of request and reply: two aiokafka hops
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from sqlalchemy import text

from tessera.bus import BatchTransaction, Bus, Emitter, Received, Transaction
from tessera.bus.service import Runtime, run_service
from tessera.bus.settings import ServiceSettings
from tessera.contracts.events import (
    DocumentPublished,
    EmbeddingRequested,
    EntityPublished,
    FreshnessInspected,
    GenerationTokenized,
    IngestionInspected,
    MemoryRecorded,
    MessagePublished,
    RecallCompleted,
    RecallRequested,
    RelationPublished,
)

BATCH = int(os.environ.get("BENCH_BATCH", "500"))
EFFECTS = (
    "INSERT INTO memory.bench_effect (tenant_id, event_id, content) "
    "SELECT tenant_id, event_id, content FROM unnest(CAST({} AS text[]), CAST({} AS text[]), CAST({} AS text[])) "
    "AS given (tenant_id, event_id, content)"
)
_INSERT = text(EFFECTS.format(":tenants", ":ids", ":contents"))


class BenchSettings(ServiceSettings, service="memory"):
    """Nothing of its own."""


async def apply(events: Sequence[Received[MessagePublished]], batch: BatchTransaction) -> None:
    """One row and one outgoing event for each."""
    columns = {
        "tenants": [event.tenant_id for event in events],
        "ids": [event.id for event in events],
        "contents": [str(event.data.content) for event in events],
    }
    await batch.connection.execute(_INSERT, columns)
    now = datetime.now(UTC)
    for event in events:
        recorded = MemoryRecorded(
            memory_id=event.id,
            kind="message",
            origin_id=event.id,
            occurred_at=event.time,
            recorded_at=now,
            importance=0.5,
            text=str(event.data.content),
        )
        await batch.of(event).publish(recorded, step="recorded", key=event.data.conversation_id.encode())


async def ignore(event: Received[Any], transaction: Transaction) -> None:
    """Not sent here."""


async def answer(event: Received[RecallRequested], emit: Emitter) -> None:
    """The smallest answer."""
    await emit.reply(RecallCompleted(memories=()))


async def unanswered(event: Received[Any], emit: Emitter) -> None:
    """Not asked here."""


def register(bus: Bus) -> None:
    """All handlers that the catalogue asks of the service memory in these two classes."""
    ingestion = bus.consumer("ingestion")
    ingestion.transactional_batch(MessagePublished)(apply)
    for other in (DocumentPublished, EntityPublished, RelationPublished):
        ingestion.transactional(other)(ignore)
    chat = bus.consumer("chat")
    chat.replying(RecallRequested)(answer)
    for asked in (EmbeddingRequested, FreshnessInspected, IngestionInspected, GenerationTokenized):
        chat.replying(asked)(unanswered)


async def build(runtime: Runtime[BenchSettings]) -> None:
    """Registers the handlers."""
    register(runtime.bus)


def serve() -> None:
    """Runs the service until SIGTERM."""
    run_service(BenchSettings, build)


async def copy() -> None:
    """COPY of inbox, effect and outbox rows and one update, batch by batch; prints the seconds it took."""
    total = int(os.environ["BENCH_EVENTS"])
    connection = await asyncpg.connect(os.environ["BENCH_DATABASE_URL"])
    headers = json.dumps([["ce_id", "x" * 36], ["ce_source", "/tessera/memory"], ["ce_type", "x" * 26], ["ce_tenantid", "bench"]])
    value = b"x" * 250
    started = time.monotonic()
    for first in range(0, total, BATCH):
        numbers = range(first, min(total, first + BATCH))
        async with connection.transaction():
            inbox = [("bench", "copy", number.to_bytes(16), number.to_bytes(16)) for number in numbers]
            await connection.copy_records_to_table(
                "inbox", schema_name="memory", records=inbox, columns=["tenant_id", "consumer", "identity", "body"]
            )
            effects = [("bench", f"m-{number}", "c" * 120) for number in numbers]
            await connection.copy_records_to_table(
                "bench_effect", schema_name="memory", records=effects, columns=["tenant_id", "event_id", "content"]
            )
            rows = [(f"{number:032x}", "memory.recorded", b"key", headers, value) for number in numbers]
            await connection.copy_records_to_table(
                "outbox", schema_name="memory", records=rows, columns=["event_id", "topic", "key", "headers", "value"]
            )
            await connection.execute(
                "INSERT INTO memory.consumer_position VALUES ('copy', 'copy', 0, $1) "
                "ON CONFLICT (consumer, topic, partition) DO UPDATE SET next_offset = excluded.next_offset",
                first,
            )
    sys.stdout.write(f"{time.monotonic() - started}\n")
    await connection.close()


async def consume() -> None:
    """getmany and validation of everything that the topic holds; prints the seconds it took."""
    total, topic = int(os.environ["BENCH_EVENTS"]), os.environ["BENCH_TOPIC"]
    consumer = AIOKafkaConsumer(bootstrap_servers=os.environ["BENCH_BOOTSTRAP"], auto_offset_reset="earliest", fetch_max_wait_ms=50)
    await consumer.start()
    consumer.assign([TopicPartition(topic, number) for number in range(int(os.environ["BENCH_PARTITIONS"]))])
    done, started = 0, 0.0
    while done < total:
        found = await consumer.getmany(timeout_ms=1000, max_records=BATCH)
        started = started or time.monotonic()
        for records in found.values():
            for record in records:
                MessagePublished.model_validate_json(record.value or b"")
            done += len(records)
    sys.stdout.write(f"{time.monotonic() - started}\n")
    await consumer.stop()


async def effect(stopping: asyncio.Event) -> None:
    """One transaction with one statement for whatever one fetch of one partition gave."""
    pool = await asyncpg.connect(os.environ["BENCH_DATABASE_URL"])
    consumer = AIOKafkaConsumer(bootstrap_servers=os.environ["BENCH_BOOTSTRAP"], auto_offset_reset="latest", fetch_max_wait_ms=500)
    await consumer.start()
    consumer.assign([TopicPartition(os.environ["BENCH_TOPIC"], number) for number in range(int(os.environ["BENCH_PARTITIONS"]))])
    await consumer.seek_to_end()
    await consumer.position(TopicPartition(os.environ["BENCH_TOPIC"], 0))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not stopping.is_set():
        for records in (await consumer.getmany(timeout_ms=200, max_records=BATCH)).values():
            ids = [dict(record.headers)["ce_id"].decode() for record in records]
            contents = [json.loads(record.value)["content"] for record in records]
            async with pool.transaction():
                await pool.execute(EFFECTS.format("$1", "$2", "$3"), ["bench"] * len(ids), ids, contents)
    await consumer.stop()


async def echo(stopping: asyncio.Event) -> None:
    """Sends back what comes, to the topic and partition named in its headers."""
    bootstrap = os.environ["BENCH_BOOTSTRAP"]
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    await producer.start()
    partition = TopicPartition(os.environ["BENCH_TOPIC"], 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="latest", fetch_max_wait_ms=50)
    await consumer.start()
    consumer.assign([partition])
    await consumer.seek_to_end(partition)
    await consumer.position(partition)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not stopping.is_set():
        for records in (await consumer.getmany(timeout_ms=200)).values():
            for record in records:
                await producer.send(os.environ["BENCH_REPLY_TOPIC"], record.value, partition=0, headers=list(record.headers))
    await consumer.stop()
    await producer.stop()


async def _until_told(role: Any) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await role(stopping)


if __name__ == "__main__":
    match sys.argv[1]:
        case "service":
            serve()
        case "copy":
            uvloop.run(copy())
        case "consume":
            uvloop.run(consume())
        case "effect":
            uvloop.run(_until_told(effect))
        case "echo":
            uvloop.run(_until_told(echo))
