"""What happened: rows, records and counters, in a form in which two runs can be compared."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from tessera.testkit import eventually_blocking, http_request
from tessera.testkit.platform import Platform

PATIENCE_SECONDS = 60.0
MESSAGE = "tessera.message.published.v1"


def messages(conversation: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The same events in every run: (id, data)."""
    text = "Message {0} of {1}: the {2} lamp was lit by keeper {3}. 灯塔 🔑"
    return [
        (
            f"{conversation}-{number:04}",
            {
                "conversation_id": conversation,
                "role": "user",
                "content": text.format(number, conversation, ("red", "green", "white")[number % 3], number * 7 % 11),
                "occurred_at": f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}Z",
            },
        )
        for number in range(count)
    ]


def produce(platform: Platform, tenant: str, events: Sequence[tuple[str, dict[str, Any]]], **settings: Any) -> None:
    """Publish as a stranger would and wait until Kafka has everything."""
    producer = Producer(
        {"bootstrap.servers": platform.stack.kafka_bootstrap_servers, "enable.idempotence": True, "linger.ms": 5, **settings}
    )
    for event_id, data in events:
        producer.produce(
            f"{platform.kafka_prefix}ingest", key=data["conversation_id"], value=json.dumps(data), headers=headers(tenant, event_id)
        )
    assert producer.flush(PATIENCE_SECONDS) == 0


def headers(tenant: str, event_id: str) -> list[tuple[str, str | bytes | None]]:
    """CloudEvents attributes of a message."""
    attributes = {"specversion": "1.0", "id": event_id, "source": "/chaos", "type": MESSAGE, "tenantid": tenant}
    return [(f"ce_{name}", value) for name, value in attributes.items()]


def rows(platform: Platform, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """Rows as the administrator sees them."""

    async def fetch() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(platform.database.admin_url)
        try:
            return [tuple(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as apart:  # the caller may stand inside a loop
        return apart.submit(asyncio.run, fetch()).result()


def settled(platform: Platform, query: str, count: int, *arguments: Any) -> list[tuple[Any, ...]]:
    """The rows once there are `count` of them."""

    def look() -> list[tuple[Any, ...]]:
        found = rows(platform, query, *arguments)
        assert len(found) == count, f"{len(found)} of {count} rows"
        return found

    return eventually_blocking(look, PATIENCE_SECONDS)


def records(platform: Platform, topic: str, tenant: str) -> list[tuple[str, Any]]:
    """(event id, data) of every record of a tenant on a topic, in order of partition and offset."""
    consumer = Consumer({"bootstrap.servers": platform.stack.kafka_bootstrap_servers, "group.id": "unused", "enable.auto.commit": False})
    try:
        name = f"{platform.kafka_prefix}{topic}"
        partitions = [TopicPartition(name, number, OFFSET_BEGINNING) for number in consumer.list_topics(name, 10).topics[name].partitions]
        left = sum(_size(consumer, partition) for partition in partitions)
        consumer.assign(partitions)
        found = []
        while left > 0:
            batch = consumer.consume(min(left, 500), 1.0)  # with more it would wait out its second
            left -= len(batch)
            found.extend(batch)
    finally:
        consumer.close()
    named = [(dict(message.headers() or ()), message) for message in found]
    mine = [(attributes, message) for attributes, message in named if attributes.get("ce_tenantid") == tenant.encode()]
    return [(attributes["ce_id"].decode(), json.loads(message.value() or b"null")) for attributes, message in mine]


def _size(consumer: Consumer, partition: TopicPartition) -> int:
    try:
        low, high = consumer.get_watermark_offsets(partition, timeout=10)
    except KafkaException as error:  # a broker that has just come back may not lead yet
        raise AssertionError(str(error)) from error
    return int(high - low)


def repeated(found: Sequence[tuple[str, Any]]) -> int:
    """How many records repeat an earlier one's id."""
    return sum(count - 1 for count in Counter(event_id for event_id, _ in found).values())


def distinct(found: Sequence[tuple[str, Any]], *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The events by id, without fields that tell the time of the run. Fails where one id has two contents."""
    events: dict[str, Any] = {}
    for event_id, data in found:
        content = {name: value for name, value in data.items() if name not in without} if isinstance(data, Mapping) else data
        assert events.setdefault(event_id, content) == content, f"{event_id} has two contents"
    return events


def counter(platform: Platform, service: str, name: str) -> float:
    """The sum of a counter over its labels, in the running process."""
    text = http_request("GET", f"{platform.processes[service].admin_url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families[name].samples if name in families else []
    return sum(sample.value for sample in samples if sample.name == f"{name}_total")
