"""Topics on the cluster, made from the catalogue and from nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tessera.bus.codec import is_tenant_id
from tessera.bus.publisher import MAXIMUM_REQUEST_BYTES, as_retryable
from tessera.bus.settings import KafkaSettings
from tessera.contracts.catalogue import KEYED_PARTITIONS, TOPICS, Mode, Topic, dead_letter_topic, ingestion_topic, refusal_topic
from tessera.contracts.errors import FatalError, InvalidError, RetryableError

_ALREADY_EXISTS: Final = 36
_FRESH_SECONDS: Final = 1.0
_WAIT_SECONDS: Final = 15.0
_FOR_EVER: Final = {"retention.ms": "-1", "retention.bytes": "-1"}
"""Bytes too: a broker's own cap must not reach what the catalogue keeps."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A topic as it should be on the cluster; `name` without the operator's prefix."""

    name: str
    partitions: int
    configuration: dict[str, str]


def wanted_topics(kafka: KafkaSettings) -> list[Wanted]:
    """Every topic of the catalogue, with the dead-letter topic and the retry topics of each consumer."""
    return [
        wanted
        for topic in TOPICS.values()
        for wanted in (_wanted(topic, topic.name, kafka), *_dead_letters(topic, kafka), *_retries(topic, kafka))
    ]


def tenant_topics(tenant_id: str, kafka: KafkaSettings) -> list[Wanted]:
    """The topics that belong to one tenant."""
    return [_wanted(TOPICS["ingest"], ingestion_topic(tenant_id), kafka), _wanted(TOPICS["refused"], refusal_topic(tenant_id), kafka)]


def _wanted(topic: Topic, name: str, kafka: KafkaSettings) -> Wanted:
    keyed = topic.partitions == KEYED_PARTITIONS
    return Wanted(name, (kafka.keyed_partitions if keyed else None) or topic.partitions, _configuration(topic, kafka))


def _configuration(topic: Topic, kafka: KafkaSettings) -> dict[str, str]:
    policy = "delete" if not topic.compacted else "compact,delete" if topic.retention else "compact"
    retention = {"retention.ms": str(int(topic.retention.total_seconds() * 1000))} if topic.retention else _FOR_EVER
    return {"cleanup.policy": policy, **retention, **_durability(kafka)}


def _dead_letters(topic: Topic, kafka: KafkaSettings) -> list[Wanted]:
    """Kept until an operator decides; records may be larger than the original by the reason."""
    configuration = {
        "cleanup.policy": "delete",
        **_FOR_EVER,
        "max.message.bytes": str(MAXIMUM_REQUEST_BYTES),
        **_durability(kafka),
    }
    readers = [consumer.service for consumer in topic.consumers if consumer.mode is not Mode.BROADCAST]
    return [Wanted(dead_letter_topic(topic.name, service), 1, configuration) for service in readers]


def _retries(topic: Topic, kafka: KafkaSettings) -> list[Wanted]:
    """One partition each: they carry what fails, which is little or a sign that hurry would do harm. Kept as long as the topic."""
    configuration = {**_configuration(topic, kafka), "max.message.bytes": str(MAXIMUM_REQUEST_BYTES)}
    return [Wanted(retry.name, 1, configuration) for reader in topic.consumers for retry in topic.retry_topics(reader.service)]


def _durability(kafka: KafkaSettings) -> dict[str, str]:
    return {"min.insync.replicas": str(kafka.minimum_in_sync_replicas)}


class TopicDirectory:
    """Knows and makes topics. Not for hot paths: what it knows is refreshed every few seconds."""

    def __init__(self, kafka: KafkaSettings, client_id: str) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._admin: AIOKafkaAdminClient | None = None
        self._known: frozenset[str] = frozenset()
        self._known_at = float("-inf")

    async def start(self) -> None:
        """Connects; does nothing when connected. Raises RetryableError while no broker answers."""
        if self._admin is not None:
            return
        admin = AIOKafkaAdminClient(**self._kafka.connection(f"{self._client_id}-admin"))
        try:
            with as_retryable():
                await admin.start()
        except RetryableError:
            await admin.close()
            raise
        self._admin = admin

    async def stop(self) -> None:
        """Disconnects."""
        admin, self._admin = self._admin, None
        if admin is not None:
            await admin.close()

    async def exists(self, topic: str) -> bool:
        """Whether a topic is there, as of at most a second ago. Raises RetryableError when Kafka does not answer."""
        if topic not in self._known and time.monotonic() - self._known_at > _FRESH_SECONDS:
            await self._refresh()
        return topic in self._known

    async def existing(self, topics: Iterable[str]) -> list[str]:
        """Those that are there now: none that was made before the call is missing. Raises RetryableError when Kafka does not answer."""
        topics = list(topics)
        if not self._known.issuperset(topics):
            await self._refresh()
        return [topic for topic in topics if topic in self._known]

    async def ensure_tenant(self, tenant_id: str) -> None:
        """Makes a tenant's topics. Raises InvalidError `tenant_invalid` for what is no tenant's id."""
        if not is_tenant_id(tenant_id):
            raise InvalidError("tenant_invalid", "That is not a tenant's id.")
        await self.ensure(tenant_topics(tenant_id, self._kafka))

    async def ensure(self, wanted: Iterable[Wanted]) -> list[str]:
        """Makes what is missing, waits until it can be used, and returns the names that were made.

        Raises FatalError when an existing topic has fewer partitions than wanted: a count never changes in place (rules of the log, 4).
        """
        wanted = list(wanted)
        await self._refresh()
        missing = [topic for topic in wanted if topic.name not in self._known]
        if missing:
            await self._create(missing)
        await self._verify(wanted)
        self._known |= {topic.name for topic in missing}
        return [topic.name for topic in missing]

    async def _create(self, missing: list[Wanted]) -> None:
        topics = [
            NewTopic(self._kafka.physical(topic.name), topic.partitions, self._kafka.replication_factor, topic_configs=topic.configuration)
            for topic in missing
        ]
        with as_retryable():
            response = await self._connected().create_topics(topics)
        failed = [error for error in response.topic_errors if error[1] not in (0, _ALREADY_EXISTS)]
        if failed:
            raise FatalError(f"Kafka did not make {failed[0][0]}: {failed[0][2] if len(failed[0]) > 2 else failed[0][1]}")

    async def _verify(self, wanted: list[Wanted]) -> None:
        """Waits until every topic has its partitions with leaders."""
        until = time.monotonic() + _WAIT_SECONDS
        while True:
            found = await self._partitions(wanted)
            wrong = [
                f"{topic.name} has {found[topic.name]} partitions, not {topic.partitions}"
                for topic in wanted
                if 0 < found[topic.name] < topic.partitions
            ]
            if not wrong and all(found[topic.name] >= topic.partitions for topic in wanted):
                return
            if time.monotonic() > until:
                raise FatalError("; ".join(wrong)) if wrong else RetryableError("Kafka has made topics but does not show them yet.")
            await asyncio.sleep(0.1)

    async def _partitions(self, wanted: list[Wanted]) -> dict[str, int]:
        names = {self._kafka.physical(topic.name): topic.name for topic in wanted}
        with as_retryable():
            described = await self._connected().describe_topics(list(names))
        counts = dict.fromkeys(names.values(), 0)
        for topic in described:
            led = [partition for partition in topic["partitions"] if partition["leader"] >= 0]
            counts[names[topic["topic"]]] = len(led)
        return counts

    async def _refresh(self) -> None:
        with as_retryable():
            names = await self._connected().list_topics()
        prefix = self._kafka.topic_prefix
        self._known = frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        self._known_at = time.monotonic()

    def _connected(self) -> AIOKafkaAdminClient:
        if self._admin is None:
            raise RetryableError("The admin client is not running.", code="broker_unavailable")
        return self._admin


async def ensure_all(kafka: KafkaSettings, *, tenants: Iterable[str] = ()) -> list[str]:
    """Makes and verifies every topic of the catalogue and of `tenants`; returns the names that were made."""
    directory = TopicDirectory(kafka, "tessera-topics")
    await directory.start()
    try:
        wanted = wanted_topics(kafka)
        for tenant_id in tenants:
            wanted += tenant_topics(tenant_id, kafka)
        return await directory.ensure(wanted)
    finally:
        await directory.stop()
