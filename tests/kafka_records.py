"""Kafka as a stranger meets it: any bytes in, all records out, and how far consumer groups are."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import OFFSET_BEGINNING, Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from tessera.testkit.platform import Platform

_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.2
"""`consume` waits so long for a full batch."""
Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Stored:
    """One record as it stands in the log."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes]

    def header(self, name: str) -> str:
        """A header as text; empty where there is none."""
        return self.headers.get(name, b"").decode(errors="replace")


def produce(platform: Platform, topic: str, value: bytes | None, headers: Headers, key: bytes | None = None) -> None:
    """Publish one record and wait until the broker has it. Blocks."""
    failures: list[object] = []
    producer = Producer({"bootstrap.servers": platform.stack.kafka_bootstrap_servers, "enable.idempotence": True, "linger.ms": 0})
    producer.produce(
        platform.kafka_prefix + topic,
        value,
        key,
        headers=list(headers),
        on_delivery=lambda error, _: failures.append(error) if error else None,
    )
    assert producer.flush(_PATIENCE_SECONDS) == 0, "Kafka did not take the record in time"
    assert not failures, failures


def topics(platform: Platform) -> list[str]:
    """Every topic of this platform, without its prefix."""
    names = _administrator(platform).list_topics(timeout=_PATIENCE_SECONDS).topics
    return sorted(name.removeprefix(platform.kafka_prefix) for name in names if name.startswith(platform.kafka_prefix))


def read_all(platform: Platform, *names: str) -> list[Stored]:
    """Every record that these topics hold now. Blocks."""
    consumer = _outsider(platform)
    try:
        ends = {partition: _bounds(consumer, partition) for partition in _partitions(platform, names)}
        filled = [TopicPartition(p.topic, p.partition, OFFSET_BEGINNING) for p, (low, high) in ends.items() if high > low]
        left = {(p.topic, p.partition): high for p, (low, high) in ends.items() if high > low}
        consumer.assign(filled)
        return list(_read(consumer, left, platform.kafka_prefix))
    finally:
        consumer.close()


def _read(consumer: Consumer, left: dict[tuple[str, int], int], prefix: str) -> list[Stored]:
    found = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left:
        assert time.monotonic() < deadline, f"not read to the end: {left}"
        for message in consumer.consume(500, _POLL_SECONDS):
            assert message.error() is None, message.error()
            place = (str(message.topic()), int(message.partition() or 0))
            found.append(
                Stored(place[0].removeprefix(prefix), place[1], message.key(), message.value(), dict(message.headers() or ()))  # type: ignore[arg-type]
            )
            if int(message.offset() or 0) + 1 >= left.get(place, 0):
                left.pop(place, None)
    return found


def lag(platform: Platform, group: str, *names: str) -> int:
    """How many records of these topics a group has not committed. Blocks."""
    consumer = _outsider(platform)
    try:
        bounds = {partition: _bounds(consumer, partition) for partition in _partitions(platform, names)}
    finally:
        consumer.close()
    asked = ConsumerGroupTopicPartitions(platform.kafka_prefix + group, list(bounds))
    administrator = _administrator(platform)  # kept until the answer is there: a client that is collected never answers
    answer = administrator.list_consumer_group_offsets([asked])[asked.group_id].result(_PATIENCE_SECONDS)
    committed = {(p.topic, p.partition): p.offset for p in answer.topic_partitions}
    return sum(high - max(low, committed[p.topic, p.partition]) for p, (low, high) in bounds.items())


def _administrator(platform: Platform) -> AdminClient:
    return AdminClient({"bootstrap.servers": platform.stack.kafka_bootstrap_servers})


def _outsider(platform: Platform) -> Consumer:
    return Consumer({"bootstrap.servers": platform.stack.kafka_bootstrap_servers, "group.id": "unused", "enable.auto.commit": False})


def _partitions(platform: Platform, names: Sequence[str]) -> list[TopicPartition]:
    known = _administrator(platform).list_topics(timeout=_PATIENCE_SECONDS).topics
    wanted = [platform.kafka_prefix + name for name in names]
    return [TopicPartition(name, number) for name in wanted for number in known[name].partitions]


def _bounds(consumer: Consumer, partition: TopicPartition) -> tuple[int, int]:
    low, high = consumer.get_watermark_offsets(partition, timeout=_PATIENCE_SECONDS)
    return int(low), int(high)
