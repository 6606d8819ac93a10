"""The bus of one process: consumers, producer, outbox relay, requests and tables behind one face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from tessera.bus import faults, outbox
from tessera.bus.codec import Encoded, Envelope, encode
from tessera.bus.consumer import Consumer, Surroundings
from tessera.bus.deadletters import UNREADABLE, DeadLetter
from tessera.bus.events import Origin, Position, Received
from tessera.bus.freshness import LogEnds
from tessera.bus.letters import DeadLetterLog
from tessera.bus.lookup import Lookup
from tessera.bus.outbox import OutboxRow
from tessera.bus.publisher import Publisher
from tessera.bus.quarantine import Quarantine
from tessera.bus.relay import Relay
from tessera.bus.requests import Requests
from tessera.bus.settings import ServiceSettings
from tessera.bus.tables import Table
from tessera.bus.topics import TopicDirectory
from tessera.bus.transaction import Transaction, source_of
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import TOPICS, Mode, TrafficClass, consumed_by, topic_of
from tessera.contracts.errors import FatalError, InvalidError, RetryableError
from tessera.contracts.ids import uuid7
from tessera.storage import Database
from tessera.telemetry import current_traceparent, span

D = TypeVar("D", bound=EventData)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A finished record. Sent twice it is the same event twice, which readers recognise by its id."""

    topic: str
    encoded: Encoded
    key: bytes
    partition: int | None = None


class Bus:
    """What a service talks through. Register consumers and tables first; the runtime starts and stops it."""

    def __init__(self, settings: ServiceSettings, database: Database | None, *, on_fatal: Callable[[FatalError], None]) -> None:
        self.settings = settings
        self.database = database
        client_id = f"{settings.service}-{settings.instance}"
        self._publisher = Publisher(settings.kafka, client_id)
        self._directory = TopicDirectory(settings.kafka, client_id)
        self._around = Surroundings(
            settings.service, settings.instance, settings.kafka, database, self._publisher, settings.drain, on_fatal, Quarantine()
        )
        self._consumers: dict[str, Consumer] = {}
        self._tables: list[Table] = []
        self._requests: Requests | None = None
        self.dead_letters = DeadLetterLog(settings.kafka, self._client_id("dead-letters"), self._directory)
        self.lookup = Lookup(settings.kafka, self._client_id("lookup"), self._publisher)
        self.log_ends = LogEnds(settings.kafka, self._client_id("log-ends"), self._directory, self._publisher)
        self._relay = Relay(settings, database, self._publisher, self._directory) if database is not None else None

    # --- consuming --------------------------------------------------------------------------------
    def consumer(self, traffic_class: str) -> Consumer:
        """The consumer of one traffic class (chat, ingestion, bulk): group `<service>.<class>`. The same object on every call."""
        if traffic_class not in self._consumers:
            self._consumers[traffic_class] = Consumer(traffic_class, self._around)
        return self._consumers[traffic_class]

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        """All consumers asked for so far."""
        return tuple(self._consumers.values())

    def table(self, event_class: type[D], on_change: Callable[[Received[D]], Awaitable[None] | None]) -> Table:
        """Reads the topic of `event_class` from its beginning, outside groups, and calls `on_change` for each event, in order.

        Every replica reads everything. Events of other classes on the topic are passed over.
        """
        table = Table(
            self.settings.kafka, self._client_id(f"table-{topic_of(event_class).name}"), event_class, on_change, self._publisher.ping
        )
        self._tables.append(table)
        return table

    def feed(self, event_class: type[D], on_event: Callable[[Received[D]], Awaitable[None] | None]) -> Table:
        """Like `table`, but only what comes from now on (commands to every replica)."""
        table = Table(
            self.settings.kafka,
            self._client_id(f"feed-{topic_of(event_class).name}"),
            event_class,
            on_event,
            self._publisher.ping,
            from_beginning=False,
        )
        self._tables.append(table)
        return table

    @property
    def requests(self) -> Requests:
        """Asking and streaming over the reply topic. The first use makes this process read reply partitions: use it before the start."""
        if self._requests is None:
            self._requests = Requests(self.settings, self._publisher, self._client_id("replies"))
        return self._requests

    def reads(self) -> frozenset[tuple[type[EventData], TrafficClass, Mode]]:
        """What this process reads and how, as registered so far; the contract tests hold it against the catalogue."""
        grouped = {
            (event, TrafficClass(consumer.name), mode) for consumer in self._consumers.values() for event, mode in consumer.handled.items()
        }
        everywhere = {table.event_class for table in self._tables} | set(TOPICS["reply"].event_types if self._requests else ())
        return frozenset(grouped | {(event, TrafficClass.CHAT, Mode.BROADCAST) for event in everywhere})

    # --- publishing -------------------------------------------------------------------------------
    async def publish(
        self,
        data: EventData,
        *,
        tenant_id: str,
        id: str | None = None,
        key: bytes | None = None,
        partition: int | None = None,
        subject_id: str | None = None,
        request_id: str | None = None,
        deadline: datetime | None = None,
        correlation_id: str | None = None,
        sequence: int | None = None,
        topic: str | None = None,
    ) -> Position:
        """Publishes now and returns where, when all in-sync replicas have it.

        `topic` names a tenant's own topic instead of the catalogue's. Without `id` a new UUIDv7; without `key` the id. Raises
        RetryableError when Kafka does not answer, InvalidError `event_too_large` or `partition_unknown`.
        """
        with span(f"publish {data.event_type}"):
            record = self.prepared(
                data,
                tenant_id=tenant_id,
                id=id,
                key=key,
                partition=partition,
                subject_id=subject_id,
                request_id=request_id,
                deadline=deadline,
                correlation_id=correlation_id,
                sequence=sequence,
                topic=topic,
            )
            return await self.send(record)

    def prepared(
        self,
        data: EventData,
        *,
        tenant_id: str,
        id: str | None = None,
        key: bytes | None = None,
        partition: int | None = None,
        subject_id: str | None = None,
        request_id: str | None = None,
        deadline: datetime | None = None,
        correlation_id: str | None = None,
        sequence: int | None = None,
        topic: str | None = None,
    ) -> Outgoing:
        """The record that `publish` would send, for whoever may have to send it more than once: the same event every time.

        Raises InvalidError `event_too_large` or `partition_unknown`.
        """
        catalogued = topic_of(type(data))
        if partition is not None and not 0 <= partition < catalogued.partitions:
            raise InvalidError("partition_unknown", f"{catalogued.name} has no partition {partition}.")
        envelope = Envelope(
            id=id or str(uuid7()),
            source=source_of(self.settings.service),
            tenant_id=tenant_id,
            subject_id=subject_id,
            request_id=request_id,
            deadline=deadline,
            traceparent=current_traceparent(),
            sequence=sequence,
            correlation_id=correlation_id,
        )
        return Outgoing(topic or catalogued.name, encode(data, envelope), key or envelope.id.encode(), partition)

    async def send(self, record: Outgoing) -> Position:
        """Publishes a prepared record and returns where, when all in-sync replicas have it. Raises as `publish` does."""
        return await self._publisher.publish(record.topic, record.encoded, key=record.key, partition=record.partition)

    @asynccontextmanager
    async def transaction(self, origin: Origin) -> AsyncIterator[Transaction]:
        """One Postgres transaction for a worker or job: state and outgoing events commit together when the block ends.

        Raises what `Database.transaction` raises, and FatalError when the service has no Postgres.
        """
        if self.database is None:
            raise FatalError(f"{self.settings.service} has no Postgres")
        async with self.database.transaction() as connection:
            rows: list[OutboxRow] = []
            yield Transaction(connection, origin, self.settings.service, rows)
            await outbox.write(connection, rows)
            faults.reach(faults.JOB_BEFORE_COMMIT)
        faults.reach(faults.JOB_COMMITTED)

    async def replay(self, letter: DeadLetter, *, dry_run: bool = False) -> None:
        """Publishes the original of a dead letter again: same topic, partition, key, headers and bytes. Returns when it is acknowledged.

        With `dry_run` it only looks whether it could. Raises InvalidError `dead_letter_unreadable`, `topic_missing` or `event_too_large`,
        RetryableError when Kafka does not answer.
        """
        origin = letter.summary.origin
        if origin is None:
            raise InvalidError(UNREADABLE, "The record does not say where the event came from.")
        if not await self._directory.exists(origin.topic):
            raise InvalidError("topic_missing", f"The topic {origin.topic} is no longer there.")
        if dry_run:
            return
        known = await self._publisher.partitions(origin.topic)
        partition = origin.partition if origin.partition in known else None
        await self._publisher.publish(origin.topic, letter.again(), key=letter.key, partition=partition)

    async def ensure_tenant_topics(self, tenant_id: str) -> None:
        """Makes the topics that belong to one tenant. Safe to repeat. Raises RetryableError when Kafka does not answer."""
        await self._directory.ensure_tenant(tenant_id)

    # --- life -------------------------------------------------------------------------------------
    async def connect(self) -> None:
        """Connects and looks for the topics. May be repeated. Raises RetryableError while no broker answers or topics are missing."""
        await self._publisher.start()
        await self._directory.start()
        service = self.settings.service
        wanted = [name for topic in consumed_by(service) for name in (topic.name, *(retry.name for retry in topic.retry_topics(service)))]
        missing = [name for name in wanted if not await self._directory.exists(name)]
        if missing:
            raise RetryableError(
                f"topics are missing, or hidden from this principal ({', '.join(missing)}): run python -m tessera.bus.make_topics, "
                "and on a secured cluster python -m tessera.bus.make_acls",
                code="topics_missing",
            )

    async def start(self) -> None:
        """Starts everything registered, after `connect`."""
        if self._requests is not None:
            await self._requests.start()
        await asyncio.gather(*(table.start() for table in self._tables))
        if self._relay is not None:
            self._relay.start()
        await asyncio.gather(*(consumer.start() for consumer in self._consumers.values()))

    async def drain(self) -> None:
        """Stops taking events, finishes what is in hand, commits and leaves the groups. Publishing still works."""
        await asyncio.gather(*(consumer.stop() for consumer in self._consumers.values()))

    async def stop(self) -> None:
        """Stops everything else; what the relay had not sent yet stays in the outbox for the next one."""
        if self._relay is not None:
            await self._relay.stop()
        await asyncio.gather(*(table.stop() for table in self._tables))
        if self._requests is not None:
            await self._requests.stop()
        await self.log_ends.close()
        await self._directory.stop()
        await self._publisher.stop()

    async def check_kafka(self) -> None:
        """Raises when no broker answers."""
        await self._publisher.ping()

    def check_progress(self) -> None:
        """Raises RetryableError when an operator must decide before some events go on."""
        for consumer in self._consumers.values():
            consumer.check_progress()

    def check_live(self) -> None:
        """Raises when a loop no longer turns."""
        readers: list[Consumer | Table | Requests] = [*self._consumers.values(), *self._tables]
        readers += [self._requests] if self._requests is not None else []
        for reader in readers:
            reader.check_live()

    def _client_id(self, part: str) -> str:
        return f"{self.settings.service}-{part}-{self.settings.instance}"
