"""The one catalogue of topics: what travels where, in which order, for how long, and who reads it how.

Topics are created from it and from nothing else. `docs/events.md` and the AsyncAPI document are generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from tessera.contracts import events
from tessera.contracts.base import EventData

KEYED_PARTITIONS: Final = 12
REPLY_PARTITIONS: Final = 32
SERVICES: Final = ("gateway", "tokenizer", "memory", "generator", "retention", "validator")


class Mode(StrEnum):
    """How a consumer makes the effect of an event happen once (rules of the log, 9)."""

    TRANSACTIONAL = "transactional"
    """Inbox, state, outbox and position in one Postgres transaction."""
    IDEMPOTENT = "idempotent"
    """Natural keys or derived ids make a repeat harmless; no inbox."""
    REPLY = "reply"
    """Repeatable, with a deadline."""
    BROADCAST = "broadcast"
    """Every replica reads everything, outside consumer groups."""


class TrafficClass(StrEnum):
    """What shares a consumer group: a backlog of one class never stalls another."""

    CHAT = "chat"
    INGESTION = "ingestion"
    BULK = "bulk"


RETRY_DELAYS: Final[Mapping[TrafficClass, tuple[timedelta, ...]]] = MappingProxyType(
    {
        TrafficClass.CHAT: (timedelta(seconds=1), timedelta(seconds=10), timedelta(minutes=1)),
        TrafficClass.INGESTION: (timedelta(seconds=5), timedelta(minutes=1), timedelta(minutes=10)),
        TrafficClass.BULK: (timedelta(seconds=30), timedelta(minutes=5), timedelta(minutes=30)),
    }
)
"""How long an event waits before each further attempt where order does not matter; after the last it is a dead letter."""


@dataclass(frozen=True)
class Consumer:
    """One service's way of reading a topic."""

    service: str
    traffic_class: TrafficClass
    mode: Mode


@dataclass(frozen=True)
class RetryTopic:
    """Where one consumer's events of one topic wait for their attempt number `attempt` (from 1) after the first ones failed."""

    topic: str
    consumer: Consumer
    attempt: int

    @property
    def delay(self) -> timedelta:
        """How long an event waits here."""
        return RETRY_DELAYS[self.consumer.traffic_class][self.attempt - 1]

    @property
    def name(self) -> str:
        """`<topic>.<service>.retry.<delay>`."""
        seconds = int(RETRY_DELAYS[self.consumer.traffic_class][self.attempt - 1].total_seconds())
        return f"{self.topic}.{self.consumer.service}.retry.{f'{seconds // 60}m' if seconds % 60 == 0 else f'{seconds}s'}"


@dataclass(frozen=True)
class Topic:
    """One topic."""

    name: str
    description: str
    event_types: tuple[type[EventData], ...]
    key: str
    """What the Kafka key is made of; never personal data."""
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    partitions: int = KEYED_PARTITIONS
    retention: timedelta | None = timedelta(days=7)
    """How long records stay; None keeps them."""
    compacted: bool = False
    order_free: bool = False
    """Events may be handled in any order, so a failing one may move to a retry topic."""
    per_tenant: bool = False
    """There is also one `<name>.<tenant>` for each tenant."""

    def consumer(self, service: str) -> Consumer | None:
        """How `service` reads this topic; None if it does not."""
        return next((consumer for consumer in self.consumers if consumer.service == service), None)

    def retry_topics(self, service: str) -> tuple[RetryTopic, ...]:
        """Where events that `service` could not handle wait, in the order of the attempts.

        None where order matters (the key waits instead), and none for requests, which are tried again in place until their deadline.
        """
        consumer = self.consumer(service)
        if consumer is None or not self.order_free or consumer.mode is not Mode.TRANSACTIONAL:
            return ()
        attempts = range(1, len(RETRY_DELAYS[consumer.traffic_class]) + 1)
        return tuple(RetryTopic(self.name, consumer, attempt) for attempt in attempts)


def _chat(service: str, mode: Mode) -> Consumer:
    return Consumer(service, TrafficClass.CHAT, mode)


def _ingestion(service: str, mode: Mode) -> Consumer:
    return Consumer(service, TrafficClass.INGESTION, mode)


def _bulk(service: str, mode: Mode = Mode.TRANSACTIONAL) -> Consumer:
    return Consumer(service, TrafficClass.BULK, mode)


_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)

_INGESTION: Final = (
    Topic(
        "ingest",
        "Raw events of producers. The shared topic believes the tenantid header; `ingest.<tenant>` belongs to its tenant.",
        (events.MessagePublished, events.DocumentPublished, events.EntityPublished, events.RelationPublished),
        key="any",
        producers=("producers", "gateway"),
        consumers=(_ingestion("memory", Mode.TRANSACTIONAL),),
        per_tenant=True,
    ),
    Topic(
        "refused",
        "Events that were refused, with the reason, for their producers: `refused.<tenant>`; `refused` where no tenant is known.",
        (events.EventRefused,),
        key="identity of the refused event",
        producers=("memory",),
        consumers=(),
        partitions=1,
        per_tenant=True,
    ),
    Topic(
        "memory.recorded",
        "The log of record: everything that memory admitted.",
        (events.MemoryRecorded,),
        key="hash(tenant, conversation | document | entity)",
        producers=("memory",),
        consumers=(_ingestion("tokenizer", Mode.IDEMPOTENT), _ingestion("retention", Mode.TRANSACTIONAL)),
        retention=None,
    ),
    Topic(
        "memory.changed",
        "New versions of memories, such as archived ones.",
        (events.MemoryChanged,),
        key="hash(tenant, memory)",
        producers=("memory",),
        consumers=(_ingestion("retention", Mode.TRANSACTIONAL),),
        retention=None,
    ),
    Topic(
        "text.tokenized",
        "Tokens of recorded memories; the n-gram engine learns from them.",
        (events.TextTokenized,),
        key="hash(tenant, memory)",
        producers=("tokenizer",),
        consumers=(_ingestion("generator", Mode.TRANSACTIONAL),),
        order_free=True,
    ),
)

_CHAT: Final = (
    Topic(
        "generation.requested",
        "Accepted generations.",
        (events.GenerationRequested,),
        key="generation",
        producers=("gateway",),
        consumers=(_chat("tokenizer", Mode.REPLY), _chat("gateway", Mode.TRANSACTIONAL)),
        retention=_DAY,
        order_free=True,
    ),
    Topic(
        "generation.tokenized",
        "Generations with their prompt counted, waiting for recall.",
        (events.GenerationTokenized,),
        key="generation",
        producers=("tokenizer",),
        consumers=(_chat("memory", Mode.REPLY),),
        retention=_DAY,
        order_free=True,
    ),
    Topic(
        "generation.ready",
        "Generations with all they need.",
        (events.GenerationReady,),
        key="generation",
        producers=("tokenizer", "memory"),
        consumers=(_chat("generator", Mode.TRANSACTIONAL),),
        retention=_DAY,
        order_free=True,
    ),
    Topic(
        "generation.cancelled",
        "Cancelled generations.",
        (events.GenerationCancelled,),
        key="generation",
        producers=("gateway",),
        consumers=(_chat("generator", Mode.TRANSACTIONAL),),
        retention=_DAY,
        order_free=True,
    ),
    Topic(
        "generation.ended",
        "What each generation came to and used.",
        (events.GenerationEnded,),
        key="generation",
        producers=("tokenizer", "generator"),
        consumers=(_chat("gateway", Mode.TRANSACTIONAL),),
    ),
    Topic(
        "recall.requested",
        "Searches of memory.",
        (events.RecallRequested,),
        key="request",
        producers=("gateway",),
        consumers=(_chat("memory", Mode.REPLY),),
        retention=_HOUR,
        order_free=True,
    ),
    Topic(
        "embedding.requested",
        "Texts to turn into vectors.",
        (events.EmbeddingRequested,),
        key="request",
        producers=("gateway",),
        consumers=(_chat("memory", Mode.REPLY),),
        retention=_HOUR,
        order_free=True,
    ),
    Topic(
        "tokenization.requested",
        "Texts to encode, tokens or compositions to decode.",
        (events.TokenizationRequested,),
        key="request",
        producers=("gateway",),
        consumers=(_chat("tokenizer", Mode.REPLY),),
        retention=_HOUR,
        order_free=True,
    ),
    Topic(
        "ingestion.inspected",
        "Questions after an ingested event, and after how fresh memory is.",
        (events.IngestionInspected, events.FreshnessInspected),
        key="request",
        producers=("gateway",),
        consumers=(_chat("memory", Mode.REPLY),),
        retention=_HOUR,
        order_free=True,
    ),
    Topic(
        "policy.requested",
        "Retention policies set or asked for.",
        (events.PolicySubmitted, events.PolicyInspected),
        key="hash(tenant, policy)",
        producers=("gateway",),
        consumers=(_chat("retention", Mode.TRANSACTIONAL),),
    ),
    Topic(
        "audit.inspected",
        "Questions after the audit trail.",
        (events.AuditInspected,),
        key="request",
        producers=("gateway",),
        consumers=(_chat("retention", Mode.REPLY),),
        retention=_HOUR,
        order_free=True,
    ),
    Topic(
        "reply",
        "Chunks, completions and answers. Each gateway replica reads the partitions it asks for, outside groups.",
        (
            events.GenerationChunk,
            events.GenerationCompleted,
            events.GenerationFailed,
            events.RecallCompleted,
            events.EmbeddingCompleted,
            events.TokenizationCompleted,
            events.IngestionReported,
            events.FreshnessReported,
            events.PolicyReported,
            events.AuditReported,
            events.SweepReported,
            events.ValidationReported,
            events.RequestFailed,
        ),
        key="generation or request",
        producers=("tokenizer", "memory", "generator", "retention", "validator"),
        consumers=(_chat("gateway", Mode.BROADCAST),),
        partitions=REPLY_PARTITIONS,
        retention=_DAY,
    ),
)

_BULK: Final = (
    Topic(
        "sweep.requested",
        "Retention sweeps and questions after them.",
        (events.SweepRequested, events.SweepInspected, events.SweepCancelled),
        key="hash(tenant, sweep)",
        producers=("gateway",),
        consumers=(_bulk("retention"),),
    ),
    Topic(
        "audit.recorded",
        "The audit trail: every administrative act, and who was refused.",
        (events.AuditRecorded,),
        key="hash(tenant)",
        producers=("gateway",),
        consumers=(_bulk("retention"),),
        retention=None,
    ),
    Topic(
        "archive.requested",
        "Memories that retention wants archived.",
        (events.ArchiveRequested,),
        key="hash(tenant, sweep)",
        producers=("retention",),
        consumers=(_bulk("memory"),),
    ),
    Topic(
        "validation.requested",
        "Datasets to judge and questions after them.",
        (events.ValidationRequested, events.ValidationInspected, events.ValidationCancelled),
        key="hash(tenant, validation)",
        producers=("gateway",),
        consumers=(_bulk("validator"),),
    ),
    Topic(
        "validation.completed",
        "Verdicts.",
        (events.ValidationCompleted,),
        key="hash(tenant, validation)",
        producers=("validator",),
        consumers=(),
        retention=None,
    ),
)


def _everyone() -> tuple[Consumer, ...]:
    return tuple(_chat(service, Mode.BROADCAST) for service in SERVICES)


_PLATFORM: Final = (
    Topic(
        "tenant.changed",
        "Tenants as they are.",
        (events.TenantChanged,),
        key="tenant",
        producers=("gateway",),
        consumers=(_chat("memory", Mode.BROADCAST),),
        partitions=1,
        retention=None,
        compacted=True,
    ),
    Topic(
        "model.declared",
        "Models as they are offered.",
        (events.ModelDeclared,),
        key="model",
        producers=("generator", "memory"),
        consumers=(_chat("gateway", Mode.BROADCAST),),
        partitions=1,
        retention=None,
        compacted=True,
    ),
    Topic(
        "service.status",
        "Every replica's health, breakers and lag.",
        (events.ServiceStatus,),
        key="service and instance",
        producers=SERVICES,
        consumers=(_chat("gateway", Mode.BROADCAST),),
        partitions=1,
        retention=_DAY,
        compacted=True,
    ),
    Topic(
        "service.control",
        "Pause, resume, reload.",
        (events.ServiceControlled,),
        key="service",
        producers=("gateway",),
        consumers=_everyone(),
        partitions=1,
        retention=_DAY,
    ),
)

TOPICS: Final[Mapping[str, Topic]] = MappingProxyType({topic.name: topic for topic in (*_INGESTION, *_CHAT, *_BULK, *_PLATFORM)})

RETRY_TOPICS: Final[Mapping[str, RetryTopic]] = MappingProxyType(
    {retry.name: retry for topic in TOPICS.values() for reader in topic.consumers for retry in topic.retry_topics(reader.service)}
)
"""Every retry topic by its name."""

_TOPIC_OF: Final = {event: topic for topic in TOPICS.values() for event in topic.event_types}
EVENT_TYPES: Final[Mapping[str, type[EventData]]] = MappingProxyType({event.event_type: event for event in _TOPIC_OF})


def topic_of(event: type[EventData]) -> Topic:
    """The topic that carries `event`. Raises KeyError for a class that no topic carries."""
    return _TOPIC_OF[event]


def ingestion_topic(tenant_id: str) -> str:
    """The ingestion topic that belongs to one tenant."""
    return f"ingest.{tenant_id}"


def refusal_topic(tenant_id: str | None) -> str:
    """Where a tenant's producers read their refusals; the shared one where no tenant is known."""
    return f"refused.{tenant_id}" if tenant_id else "refused"


def consumer_group(service: str, traffic_class: TrafficClass | str) -> str:
    """The consumer group of one service and traffic class."""
    return f"{service}.{traffic_class}"


def dead_letter_topic(topic: str, service: str) -> str:
    """Where one consumer's dead letters of `topic` go. A tenant's own topics share their catalogue entry's."""
    return f"{catalogued(topic).name}.{service}.dlq"


def catalogued(topic: str) -> Topic:
    """The catalogue entry of a topic's name, also of a tenant's own topic and of a retry topic. Raises KeyError if there is none."""
    if topic in TOPICS:
        return TOPICS[topic]
    if topic in RETRY_TOPICS:
        return TOPICS[RETRY_TOPICS[topic].topic]
    base = topic.split(".", 1)[0]
    if base in TOPICS and TOPICS[base].per_tenant:
        return TOPICS[base]
    raise KeyError(topic)


def tenant_of_topic(topic: str) -> str | None:
    """The tenant that a topic belongs to; None for a shared one."""
    return None if topic in TOPICS or topic in RETRY_TOPICS else topic.split(".", 1)[1]


def consumed_by(service: str) -> tuple[Topic, ...]:
    """Every topic that `service` reads."""
    return tuple(topic for topic in TOPICS.values() if topic.consumer(service))


def produced_by(service: str) -> tuple[Topic, ...]:
    """Every topic that `service` writes."""
    return tuple(topic for topic in TOPICS.values() if service in topic.producers)
