"""CloudEvents on Kafka as a stranger writes and reads them: confluent-kafka only, nothing of ours on the wire's way."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from pydantic import BaseModel

from tessera.testkit.waiting import DEFAULT

_POLL_SECONDS = 0.05


def unique_kafka_prefix() -> str:
    """A prefix that no other test uses: topics and groups under it are this test's own."""
    return f"t{uuid.uuid4().hex[:10]}."


def create_topics(bootstrap_servers: str, *topics: str, topic_prefix: str = "", partitions: int = 1) -> None:
    """Create topics of a test's own, outside the catalogue. Raises KafkaException when one exists. Blocks."""
    administrator = AdminClient({"bootstrap.servers": bootstrap_servers})
    created = administrator.create_topics([NewTopic(topic_prefix + topic, partitions) for topic in topics])
    for future in created.values():
        future.result()


@dataclass(frozen=True)
class Written:
    """Where an event was stored."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class CloudEvent:
    """One record in CloudEvents' binary mode: attributes without their `ce_` prefix, and the decoded value."""

    attributes: Mapping[str, str]
    data: Any
    """The value as JSON; the raw bytes when it is none."""
    key: bytes | None
    topic: str
    partition: int
    offset: int
    headers: Mapping[str, bytes] = field(default_factory=dict)
    """All headers as they stand in the record."""

    @property
    def type(self) -> str:
        """Attribute `type`."""
        return self.attributes.get("type", "")

    @property
    def id(self) -> str:
        """Attribute `id`."""
        return self.attributes.get("id", "")


class CloudEventProducer:
    """Publishes CloudEvents with acks=all. Methods are async and do not block the loop."""

    def __init__(self, bootstrap_servers: str, topic_prefix: str = "", source: str = "urn:tessera:testkit") -> None:
        self._producer = Producer({"bootstrap.servers": bootstrap_servers, "enable.idempotence": True, "linger.ms": 0})
        self._prefix = topic_prefix
        self._source = source

    async def publish(
        self,
        topic: str,
        data: BaseModel | Mapping[str, Any] | bytes,
        *,
        type: str | None = None,
        id: str | None = None,
        key: bytes | None = None,
        partition: int = -1,
        **attributes: str | None,
    ) -> Written:
        """Publish one event and wait until the broker has it. A model's class gives `type`; an attribute of None is left out.

        Attributes are CloudEvents names: tenantid, subjectid, requestid, deadline, traceparent, sequence, source, time, specversion.
        Raises KafkaException when the broker refuses it.
        """
        named = {
            "specversion": "1.0",
            "id": id or str(uuid.uuid4()),
            "source": self._source,
            "type": type or getattr(data, "event_type", None),
            "time": datetime.now(UTC).isoformat(),
            **attributes,
        }
        headers = {f"ce_{name}": value.encode() for name, value in named.items() if value is not None}
        headers["content-type"] = b"application/json"
        return await asyncio.to_thread(self._produce, self._prefix + topic, _encoded(data), key, partition, headers)

    def _produce(self, topic: str, value: bytes, key: bytes | None, partition: int, headers: Mapping[str, bytes]) -> Written:
        told: list[tuple[KafkaError | None, Message]] = []
        self._producer.produce(
            topic,
            value,
            key,
            partition=partition,
            headers=list(headers.items()),
            on_delivery=lambda error, message: told.append((error, message)),
        )
        self._producer.flush(DEFAULT.total_seconds())
        if not told:
            raise TimeoutError(f"{topic} did not take the event")
        error, message = told[0]
        if error is not None:
            raise KafkaException(error)
        return Written(str(message.topic()), int(message.partition() or 0), int(message.offset() or 0))


class CloudEventReader:
    """Reads whole topics from the beginning, outside consumer groups. Everything read is kept in `seen`, in order of arrival."""

    def __init__(self, bootstrap_servers: str, *topics: str, topic_prefix: str = "") -> None:
        self.seen: list[CloudEvent] = []
        self._topics = [topic_prefix + topic for topic in topics]
        self._consumer = Consumer(
            {"bootstrap.servers": bootstrap_servers, "group.id": "unused", "enable.auto.commit": False, "fetch.wait.max.ms": 50}
        )
        self._assigned = False

    async def until(self, found: Callable[[Sequence[CloudEvent]], bool], timeout: timedelta = DEFAULT) -> list[CloudEvent]:  # noqa: ASYNC109
        """Read until `found(seen)` is true and give back all seen; raises AssertionError, naming what was seen, after the time-out."""
        return await asyncio.to_thread(self._until, found, timeout)

    async def read(self, count: int, timeout: timedelta = DEFAULT) -> list[CloudEvent]:  # noqa: ASYNC109
        """Read until `count` events were seen in all."""
        return await self.until(lambda seen: len(seen) >= count, timeout)

    async def of_type(self, *types: str, count: int = 1, timeout: timedelta = DEFAULT) -> list[CloudEvent]:  # noqa: ASYNC109
        """Read until `count` events of these types were seen; gives back only those."""
        seen = await self.until(lambda events: sum(event.type in types for event in events) >= count, timeout)
        return [event for event in seen if event.type in types]

    async def close(self) -> None:
        """Leave; the reader is of no use afterwards."""
        await asyncio.to_thread(self._consumer.close)

    def _until(self, found: Callable[[Sequence[CloudEvent]], bool], timeout: timedelta) -> list[CloudEvent]:
        deadline = time.monotonic() + timeout.total_seconds()
        self._assign(deadline)
        while not found(self.seen):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout}; seen {len(self.seen)}: {[(e.topic, e.type, e.data) for e in self.seen[-10:]]}")
            self._poll()
        return list(self.seen)

    def _assign(self, deadline: float) -> None:
        """A topic that does not exist yet is waited for."""
        while not self._assigned:
            known = self._consumer.list_topics(timeout=5).topics
            partitions = [
                TopicPartition(topic, number, OFFSET_BEGINNING)
                for topic in self._topics
                for number in getattr(known.get(topic), "partitions", ())
            ]
            if len({partition.topic for partition in partitions}) == len(set(self._topics)):
                self._consumer.assign(partitions)
                self._assigned = True
            elif time.monotonic() > deadline:
                raise AssertionError(f"of {self._topics} only {sorted({p.topic for p in partitions})} exist")
            else:
                time.sleep(_POLL_SECONDS)

    def _poll(self) -> None:
        for message in self._consumer.consume(500, _POLL_SECONDS):
            if message.error() is None:
                self.seen.append(_decoded(message))


def _encoded(data: BaseModel | Mapping[str, Any] | bytes) -> bytes:
    if isinstance(data, bytes):
        return data
    return data.model_dump_json().encode() if isinstance(data, BaseModel) else json.dumps(data).encode()


def _decoded(message: Message) -> CloudEvent:
    headers = {name: value if isinstance(value, bytes) else b"" for name, value in dict(message.headers() or ()).items()}
    attributes = {name.removeprefix("ce_"): value.decode() for name, value in headers.items() if name.startswith("ce_")}
    value = message.value() or b""
    try:
        data: Any = json.loads(value)
    except ValueError:
        data = value
    key = message.key()
    encoded_key = key.encode() if isinstance(key, str) else key
    return CloudEvent(
        attributes, data, encoded_key, str(message.topic()), int(message.partition() or 0), int(message.offset() or 0), headers
    )
