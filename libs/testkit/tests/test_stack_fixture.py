"""The stack fixture gives three servers that do real work."""

import asyncpg
import pytest
from redis import Redis

from tessera.testkit import CloudEventProducer, CloudEventReader, Stack, create_topics

pytestmark = pytest.mark.integration


async def test_an_event_travels_through_kafka(stack: Stack, kafka_prefix: str) -> None:
    create_topics(stack.kafka_bootstrap_servers, "there", topic_prefix=kafka_prefix, partitions=2)
    producer = CloudEventProducer(stack.kafka_bootstrap_servers, kafka_prefix)
    written = await producer.publish("there", {"text": "你好 🌍"}, type="tessera.test.happened.v1", tenantid="acme", subjectid=None)
    reader = CloudEventReader(stack.kafka_bootstrap_servers, "there", topic_prefix=kafka_prefix)
    [event] = await reader.of_type("tessera.test.happened.v1")
    await reader.close()
    assert event.data == {"text": "你好 🌍"}
    assert event.attributes["tenantid"] == "acme"
    assert "subjectid" not in event.attributes
    assert (event.partition, event.offset) == (written.partition, written.offset)


async def test_postgres_has_vectors(stack: Stack) -> None:
    connection = await asyncpg.connect(stack.database_url)
    version = await connection.fetchval("select default_version from pg_available_extensions where name = 'vector'")
    await connection.close()
    assert tuple(int(part) for part in version.split(".")) >= (0, 8, 4)


def test_redis_keeps_a_value(stack: Stack, kafka_prefix: str) -> None:
    with Redis.from_url(stack.redis_url, retry=None) as client:
        client.set(kafka_prefix, b"1", ex=60)
        assert client.get(kafka_prefix) == b"1"
