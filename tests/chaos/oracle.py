"""What is true once all is quiet, compared with what was promised (the checker: `tessera.testkit.history`)."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chaos.load import Ledger
from chaos.observing import rows
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from tessera.contracts.catalogue import SERVICES, consumed_by, consumer_group, dead_letter_topic
from tessera.testkit.history import ANOMALIES, Findings, History, Outgoing, Sent, check
from tessera.testkit.platform import Platform

_READ = ("memory.recorded", "text.tokenized", "reply", "validation.completed")
_TIMED = {"recorded_at", "finished_at", "created_at"}
_WITH_TABLES = tuple(service for service in SERVICES if service != "tokenizer")
_LEFT = ("outbox", "batch_mark", "parked WHERE state NOT IN ('refused', 'dead')")
"""Tables of delivery in which nothing is left once all is quiet."""
_OPEN = {
    "generations": "SELECT generation_id FROM generator.generation_job WHERE tenant_id = $1 AND finished_at IS NULL",
    "validations": "SELECT validation_id FROM validator.validations WHERE tenant_id = $1 AND finished_at IS NULL",
    "sweeps": "SELECT sweep_id FROM retention.sweeps WHERE tenant_id = $1 AND state = 'running'",
}
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Seen:
    """One record of interest."""

    topic: str
    id: str
    data: Any


class Oracle:
    """Looks at one tenant, from what the log held when it was made."""

    def __init__(self, platform: Platform, tenant: str) -> None:
        self._platform = platform
        self._tenant = tenant
        self._admin = AdminClient({"bootstrap.servers": platform.stack.kafka_bootstrap_servers, "log_level": 0})
        self._dead = tuple(dead_letter_topic(topic.name, service) for service in SERVICES for topic in consumed_by(service))
        self._begin = self._ends((*_READ, *self._dead))

    # --- waiting ----------------------------------------------------------------------------------
    def settled(self, ledger: Ledger, seconds: float, expected_dead: Iterable[str] = ()) -> Findings:
        """The findings once nothing is left to do and nothing is missing, or after so many seconds. Blocks."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                findings = self._look(ledger, frozenset(expected_dead))
            except (KafkaException, OSError) as error:
                findings = Findings(stuck=[f"cannot be looked at: {error!r}"])
            if findings.clean or time.monotonic() > deadline:
                return findings
            time.sleep(_POLL_SECONDS)

    def _look(self, ledger: Ledger, expected_dead: frozenset[str]) -> Findings:
        """What is still to be done is looked for first: the rest costs more and means nothing before."""
        unfinished = [*ledger.unfinished, *self._leftovers(), *self._lag()]
        if unfinished:
            return Findings(stuck=unfinished)
        return self.findings(ledger, expected_dead)

    # --- findings ---------------------------------------------------------------------------------
    def findings(self, ledger: Ledger, expected_dead: frozenset[str] = frozenset()) -> Findings:
        """Everything that was promised, beside everything that is there. Blocks."""
        seen: dict[str, list[Seen]] = defaultdict(list)
        for record in self._records():
            seen[record.topic].append(record)
        dead = [record.id for topic in self._dead for record in seen[topic]]
        effects = self._rows("SELECT origin_id, id::text FROM memory.memory WHERE tenant_id = $1")
        recorded = seen["memory.recorded"]
        memories = [memory for _, memory in effects]
        return _joined(
            check(
                History(
                    sent=ledger.sent,
                    acknowledged=set(ledger.acknowledged) - expected_dead,
                    refused=expected_dead & set(dead),
                    effects=[origin for origin, _ in effects],
                    effects_ordered=False,  # rows of one transaction lie where Postgres finds room; the outbox keeps their order
                    outgoing=[Outgoing(record.id, record.data["origin_id"], _content(record.data)) for record in recorded],
                )
            ),
            check(self._learned(memories, seen["text.tokenized"])),
            check(_all_of(memories, self._column("SELECT memory_id FROM retention.memories WHERE tenant_id = $1"))),
            Findings(
                lost=[*self._unanswered(ledger), *(f"{event} is in the dead letters" for event in set(dead) - expected_dead)],
                doubled=[*_twice(seen["reply"], "generation_id"), *_twice(seen["validation.completed"], "validation_id")],
            ),
        )

    def told(self, topic: str, count: int) -> list[Seen]:
        """The first records of the tenant on a topic."""
        return [record for record in self._records() if record.topic == topic][:count]

    def _learned(self, memories: list[str], tokenized: list[Seen]) -> History:
        learned = self._column("SELECT memory_id FROM generator.ngram_learned WHERE tenant_id = $1")
        outgoing = [Outgoing(record.id, record.data["memory_id"], _content(record.data)) for record in tokenized]
        return replace(_all_of(memories, learned), outgoing=outgoing)

    def _unanswered(self, ledger: Ledger) -> list[str]:
        """Promised to somebody, and not there."""
        jobs = self._rows("SELECT state, count(*) FROM generator.generation_job WHERE tenant_id = $1 GROUP BY state")
        completed = dict(jobs).get("completed", 0)
        missing = [f"{len(ledger.chats)} chats were answered and {completed} completed"] if completed < len(ledger.chats) else []
        validations = set(self._column("SELECT validation_id FROM validator.validations WHERE tenant_id = $1 AND state = 'completed'"))
        sweeps = set(self._column("SELECT sweep_id FROM retention.sweeps WHERE tenant_id = $1 AND state = 'planned'"))
        missing += [f"validation {name} was accepted and is not completed" for name in set(ledger.validations) - validations]
        return missing + [f"sweep {name} was accepted and is not planned" for name in set(ledger.sweeps) - sweeps]

    # --- what is left to do -----------------------------------------------------------------------
    def _leftovers(self) -> list[str]:
        having = [service for service in _WITH_TABLES if self._has(service)]
        counts = " UNION ALL ".join(
            f"SELECT '{service}', '{table.split()[0]}', count(*) FROM {service}.{table}" for service in having for table in _LEFT
        )
        found = [f"{count} rows in {service}.{table}" for service, table, count in rows(self._platform, counts) if count]
        services = {"generations": "generator", "validations": "validator", "sweeps": "retention"}
        queries = [(name, query) for name, query in _OPEN.items() if self._has(services[name])]
        return found + [f"{name}: {left} open" for name, query in queries if (left := len(self._rows(query)))]

    def _lag(self) -> list[str]:
        """What operators would see: the groups' offsets behind the ends of their partitions."""
        found = []
        for group, topics in self._groups().items():
            ends = self._ends(topics)
            offsets = [TopicPartition(topic, number) for topic, number in ends]
            asked = ConsumerGroupTopicPartitions(f"{self._platform.kafka_prefix}{group}", offsets)
            (answer,) = self._admin.list_consumer_group_offsets([asked], request_timeout=10).values()
            for place in answer.result().topic_partitions:
                behind = ends[place.topic, place.partition] - max(0, place.offset)
                found += [f"{group} is {behind} behind on {place.topic}:{place.partition}"] if behind > 0 else []
        return found

    def _groups(self) -> Mapping[str, list[str]]:
        groups: dict[str, list[str]] = defaultdict(list)
        for service in self._platform.services:
            for topic in consumed_by(service):
                consumer = topic.consumer(service)
                if consumer is not None and consumer.mode != "broadcast":
                    names = [topic.name, f"{topic.name}.{self._tenant}"] if topic.per_tenant else [topic.name]
                    groups[consumer_group(service, consumer.traffic_class)] += names
        return groups

    def _has(self, service: str) -> bool:
        return service in self._platform.services

    # --- reading ----------------------------------------------------------------------------------
    def _ends(self, topics: Iterable[str]) -> dict[tuple[str, int], int]:
        known = self._admin.list_topics(timeout=10).topics
        names = [name for topic in topics if (name := f"{self._platform.kafka_prefix}{topic}") in known]
        places = [TopicPartition(name, number) for name in names for number in known[name].partitions]
        asked = self._admin.list_offsets(dict.fromkeys(places, OffsetSpec.latest()), request_timeout=10)
        return {(place.topic, place.partition): future.result().offset for place, future in asked.items()}

    def _records(self) -> list[Seen]:
        """The tenant's records of all topics of interest, in order of each partition."""
        ends = self._ends((*_READ, *self._dead))
        open_ones = {place: end for place, end in ends.items() if end > self._begin.get(place, 0)}
        if not open_ones:
            return []
        consumer = Consumer(
            {
                "bootstrap.servers": self._platform.stack.kafka_bootstrap_servers,
                "group.id": "unused",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        try:
            consumer.assign([TopicPartition(*place, self._begin.get(place, 0)) for place in open_ones])
            return self._read(consumer, open_ones)
        finally:
            consumer.close()

    def _read(self, consumer: Consumer, ends: dict[tuple[str, int], int]) -> list[Seen]:
        found, deadline = [], time.monotonic() + 60
        while ends and time.monotonic() < deadline:
            for record in consumer.consume(1_000, 0.5):
                if record.error() is not None:
                    continue
                attributes = dict(record.headers() or ())
                if attributes.get("ce_tenantid") == self._tenant.encode():
                    found.append(_seen(str(record.topic()).removeprefix(self._platform.kafka_prefix), attributes, record.value()))
            now = consumer.position([TopicPartition(*place) for place in ends])
            ends = {(place.topic, place.partition): ends[place.topic, place.partition] for place in now if not _reached(place, ends)}
        if ends:
            raise OSError(f"Kafka did not give {sorted(ends)}")
        return found

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        return rows(self._platform, query, self._tenant)

    def _column(self, query: str) -> list[str]:
        return [str(value) for (value,) in self._rows(query)]


def _reached(place: TopicPartition, ends: Mapping[tuple[str, int], int]) -> bool:
    return bool(place.offset >= ends[place.topic, place.partition])


def _seen(topic: str, attributes: Mapping[str, Any], value: bytes | None) -> Seen:
    try:
        data = json.loads(value or b"null")
    except ValueError:
        data = None
    return Seen(topic, (attributes.get("ce_id") or b"?").decode(errors="replace"), data)


def _content(data: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in data.items() if name not in _TIMED}, sort_keys=True)


def _all_of(memories: list[str], effects: list[str]) -> History:
    """Every memory has had its effect in another service, in whatever order."""
    return History(sent=[Sent(memory, memory) for memory in memories], acknowledged=memories, effects=effects, ordered=False)


def _twice(records: Iterable[Seen], name: str) -> list[str]:
    """Ends of a job that were told under more than one id. Chunks are none: they have an index."""
    told = [record for record in records if isinstance(record.data, dict) and name in record.data and _is_end(record.data)]
    ends = {(record.data[name], record.id) for record in told}
    return [f"{job} ended {count} times" for job, count in Counter(job for job, _ in ends).items() if count > 1]


def _is_end(data: Mapping[str, Any]) -> bool:
    return "finish_reason" in data or "report" in data or "problem" in data


def _joined(*findings: Findings) -> Findings:
    return Findings(**{name: [line for each in findings for line in getattr(each, name)] for name in ANOMALIES})
