"""One consumer group of a service: one traffic class, all its topics, dispatch by event type.

A backlog, a pause or a rebalance of one class never stalls another (rules of the log, 12).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Final, TypeVar, cast

from aiokafka import ConsumerRebalanceListener, TopicPartition

from tessera.bus.applying import Workshop
from tessera.bus.broker import Feed, end_stuck, group_feed
from tessera.bus.caution import HandlerLimits, LetterGuard, LetterLimit
from tessera.bus.emitting import Emitter
from tessera.bus.events import Received
from tessera.bus.partitions import BACKOFF, PASSING, Assignment, Gate, PartitionLoop
from tessera.bus.publisher import Publisher, as_retryable
from tessera.bus.quarantine import Quarantine
from tessera.bus.records import Record
from tessera.bus.registry import Handler, RefusalHandler, Registration, Registry
from tessera.bus.settings import KafkaSettings
from tessera.bus.stateless import Bench, StatelessLoop
from tessera.bus.together import Together
from tessera.bus.transaction import BatchTransaction, Transaction
from tessera.bus.transactional import TransactionalLoop
from tessera.bus.watch import Watch
from tessera.contracts.base import EventData
from tessera.contracts.catalogue import Mode, Topic, TrafficClass, catalogued, consumer_group
from tessera.contracts.errors import FatalError, RetryableError
from tessera.contracts.events import ConsumerStatus, ParkedDecision, StuckEvent
from tessera.resilience import retrying
from tessera.storage import Database
from tessera.telemetry import get_logger, metrics

D = TypeVar("D", bound=EventData)
OnTransaction = Callable[[Received[D], Transaction], Awaitable[None]]
OnBatch = Callable[[Sequence[Received[D]], BatchTransaction], Awaitable[None]]
H = TypeVar("H")
OnEvent = Callable[[Received[D], Emitter], Awaitable[None]]

_STALLED_AFTER: Final = timedelta(seconds=60)
_LEAVE_WITHIN: Final = timedelta(seconds=10)
_TENANT_PATTERN: Final = "[a-z0-9][a-z0-9_-]*"
_STUCK_SHOWN: Final = 20

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a consumer needs of its process."""

    service: str
    instance: str
    kafka: KafkaSettings
    database: Database | None
    publisher: Publisher
    drain: timedelta
    on_fatal: Callable[[FatalError], None]
    quarantine: Quarantine


class Consumer:
    """The handlers of one traffic class, and the loops that call them. Made by `Bus.consumer`; started by the bus."""

    def __init__(self, name: str, surroundings: Surroundings) -> None:
        self.name = name
        self._around = surroundings
        self._registry = Registry(surroundings.service, TrafficClass(name))
        self._group = consumer_group(surroundings.service, name)
        self._gate = Gate()
        self._loops: dict[TopicPartition, PartitionLoop] = {}
        self._membership: _Membership | None = None
        kafka = surroundings.kafka
        self._watch = Watch(
            self._group,
            consumer=lambda: self._joined.consumer,
            kafka_answers=surroundings.publisher.ping,
            rejoin=self._rejoin,
            patience=timedelta(seconds=kafka.rebalance_timeout_seconds + kafka.session_timeout_seconds),
        )
        retry = surroundings.kafka.retry
        self._guard = LetterGuard(LetterLimit(retry.dead_letters_in_a_row, retry.dead_letters_share))
        self._bench = Bench(
            surroundings.service,
            surroundings.publisher,
            self._registry,
            asyncio.Semaphore(surroundings.kafka.window),
            surroundings.quarantine,
            timedelta(milliseconds=surroundings.kafka.commit_milliseconds),
            retry.handler_seconds.of(name),
            self._guard,
            surroundings.database,
        )
        self._in_flight = asyncio.Semaphore(surroundings.kafka.partitions_in_flight)
        self._together: Together | None = None

    # --- registration -----------------------------------------------------------------------------
    def transactional(self, event_class: type[D]) -> Callable[[OnTransaction[D]], OnTransaction[D]]:
        """Registers a handler whose effect commits with inbox, outbox and position. Raises ValueError if the catalogue says otherwise."""
        return self._registering(event_class, Mode.TRANSACTIONAL)

    def transactional_batch(self, event_class: type[D]) -> Callable[[OnBatch[D]], OnBatch[D]]:
        """As `transactional`, for a handler that takes neighbours of one type together, in their order.

        It may be called with any number of them. Where it raises InvalidError for several, each is handled alone, so that only the
        culprit is refused. Raises ValueError if the catalogue says otherwise.
        """
        return self._registering(event_class, Mode.TRANSACTIONAL, batched=True)

    def idempotent(self, event_class: type[D]) -> Callable[[OnEvent[D]], OnEvent[D]]:
        """Registers a handler that may be repeated: natural keys, derived ids. Raises ValueError if the catalogue says otherwise."""
        return self._registering(event_class, Mode.IDEMPOTENT)

    def replying(self, event_class: type[D]) -> Callable[[OnEvent[D]], OnEvent[D]]:
        """Registers a handler that answers a request or passes it on. Raises ValueError if the catalogue says otherwise."""
        return self._registering(event_class, Mode.REPLY)

    def on_refused(self, handler: RefusalHandler) -> RefusalHandler:
        """Registers what is called for each refused event of a producer outside, within the transaction.

        It gets (tenant, refusal, connection). Refusals that belong to no known tenant are not among them. At most one handler; it must
        be repeatable.
        """
        self._registry.on_refused = handler
        return handler

    @property
    def handled(self) -> dict[type[EventData], Mode]:
        """What is registered, and how."""
        return self._registry.modes()

    def _registering(self, event_class: type[EventData], mode: Mode, *, batched: bool = False) -> Callable[[H], H]:
        def register(handler: H) -> H:
            self._registry.add(Registration(event_class, mode, cast(Handler, handler), batched))
            return handler

        return register

    # --- life -------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Joins the group, however long Kafka is away. Returns when partitions are assigned.

        Raises ValueError when a type on a topic has no handler.
        """
        topics = self._registry.topics()
        if any(self._mode(topic) is Mode.TRANSACTIONAL for topic in topics) and self._around.database is None:
            raise ValueError(f"{self._group} has transactional handlers but the service has no Postgres")
        await retrying(BACKOFF, PASSING)(self._join)
        self._watch.start()

    async def stop(self) -> None:
        """Drains every partition, commits, leaves the group. Returns within the drain deadline plus the time to disconnect."""
        await self._watch.stop()
        await self._release(list(self._loops))
        if self._membership is not None:
            await self._membership.feed.stop()

    async def _join(self) -> None:
        """Raises RetryableError; then it has to be called again."""
        self._membership = joining = _Membership(self)
        try:
            with as_retryable():
                await joining.feed.start()
        except PASSING as error:
            _log.warning("waiting for Kafka", consumer=self._group, error=str(error))
            joining.over = True
            await self._release(list(self._loops))
            await end_stuck(joining.feed, _LEAVE_WITHIN)
            raise

    async def _rejoin(self) -> None:
        """As a new member with new connections; what is in hand is drained first, as in any revocation. Raises RetryableError."""
        former = self._membership
        if former is not None:
            former.over = True
            await self._release(list(self._loops))
            await end_stuck(former.feed, _LEAVE_WITHIN)
        await self._join()

    def pause(self) -> None:
        """Takes nothing further until `resume`; what is in hand goes on."""
        self._gate.close()

    def resume(self) -> None:
        """Takes up work again; a consumer that halted itself begins to count anew."""
        self._guard.forgive()
        self._gate.open()

    def decide(self, decision: ParkedDecision) -> None:
        """An operator's word about a parked event; passed over where this replica does not have its partition."""
        for loop in self._loops.values():
            if loop.assignment.name == decision.topic and loop.assignment.partition.partition == decision.partition:
                loop.decide(decision.offset, discard=decision.outcome == "discard")

    def check_live(self) -> None:
        """Raises RetryableError when work has been waiting without progress, neither paused nor backing off, or joining anew is in vain."""
        self._watch.check_live()
        stalled = [str(partition) for partition, loop in self._loops.items() if loop.stalled_for() > _STALLED_AFTER]
        if stalled:
            raise RetryableError(f"no progress on {', '.join(stalled)}", code="consumer_stalled")

    def check_progress(self) -> None:
        """Raises RetryableError when an operator is needed: the consumer halted itself, or events are stuck."""
        if self._guard.reason is not None:
            raise RetryableError(f"{self._group} is halted: {self._guard.reason}", code="consumer_halted")
        stuck = self._stuck()
        if stuck:
            where = ", ".join(f"{event.topic}/{event.partition}/{event.offset} ({event.code})" for event in stuck[:3])
            raise RetryableError(f"{self._group} has stuck events: {where}", code="events_stuck")

    def status(self) -> ConsumerStatus:
        """What this consumer does now."""
        stuck, waiting = self._stuck(), sum(loop.set_aside for loop in self._loops.values())
        metrics.BUS_PARKED.labels(consumer=self._group, state="stuck").set(len(stuck))
        metrics.BUS_PARKED.labels(consumer=self._group, state="waiting").set(waiting - len(stuck))
        metrics.BUS_HALTED.labels(consumer=self._group).set(self._guard.reason is not None)
        return ConsumerStatus(
            name=self.name,
            state=self._state(),
            partitions=len(self._loops),
            lag=sum(map(self._lag, self._loops)),
            halted=self._guard.reason,
            parked=waiting or None,
            stuck=tuple(stuck[:_STUCK_SHOWN]) or None,
        )

    def _stuck(self) -> list[StuckEvent]:
        return [event for loop in self._loops.values() for event in loop.stuck()]

    def _state(self) -> str:
        if self._membership is None:
            return "stopped"
        if self._gate.closed:
            return "paused"
        return "backing_off" if any(loop.state == "backing_off" for loop in self._loops.values()) else "running"

    def _lag(self, partition: TopicPartition) -> int:
        """Records that the broker has and no handler has finished, as far as the last fetch knew."""
        loop = self._loops[partition]
        consumer = loop.assignment.consumer
        if partition not in consumer.assignment():
            return 0
        end, position = consumer.highwater(partition), loop.position
        lag = max(0, end - position) if end is not None and position is not None else loop.waiting
        metrics.BUS_LAG.labels(consumer=self._group, topic=self._topic(partition).name, partition=str(partition.partition)).set(lag)
        return lag

    # --- plumbing ---------------------------------------------------------------------------------
    @property
    def _joined(self) -> Feed:
        if self._membership is None:
            raise RuntimeError("the consumer is not running")
        return self._membership.feed

    def _new_feed(self, membership: _Membership) -> Feed:
        names, pattern = self._subscription(self._registry.topics())
        return group_feed(
            self._around.kafka,
            f"{self._around.service}-{self.name}-{self._around.instance}",
            self._group,
            topics=names,
            pattern=pattern,
            listener=membership,
            receive=membership.receive,
        )

    def _subscription(self, topics: Iterable[Topic]) -> tuple[tuple[str, ...], str | None]:
        """Names, or one pattern where tenants have topics of their own: a new tenant's is found at the next refresh of the metadata."""
        kafka = self._around.kafka
        topics = list(topics)
        retries = [retry.name for topic in topics for retry in topic.retry_topics(self._around.service)]
        if not any(topic.per_tenant for topic in topics):
            return tuple(kafka.physical(name) for name in (*(topic.name for topic in topics), *retries)), None
        choices = [*(choice for topic in topics for choice in self._choices(topic)), *map(re.escape, retries)]
        return (), f"^{re.escape(kafka.topic_prefix)}({'|'.join(choices)})$"

    def _choices(self, topic: Topic) -> list[str]:
        escaped = re.escape(topic.name)
        if not topic.per_tenant:
            return [escaped]
        return [f"{escaped}\\.{_TENANT_PATTERN}", *([escaped] if self._around.kafka.shared_ingest else [])]

    def _topic(self, partition: TopicPartition) -> Topic:
        return catalogued(self._around.kafka.logical(partition.topic))

    def _mode(self, topic: Topic) -> Mode:
        consumer = topic.consumer(self._around.service)
        if consumer is None:
            raise ValueError(f"{self._around.service} does not read {topic.name}")
        return consumer.mode

    async def _receive(self, records: tuple[Record, ...]) -> None:
        for (topic, number), group in groupby(records, key=lambda record: (record.topic, record.partition)):
            loop = self._loops.get(TopicPartition(topic, number))
            if loop is not None:
                loop.offer(group)

    async def _assign(self, partitions: Collection[TopicPartition]) -> None:
        """Begins a loop per partition. Never raises: what may fail is repeated inside the loop."""
        if not partitions:
            _log.warning("no partition for this replica, it stands by: the group has more members than partitions", consumer=self._group)
        for partition in partitions:
            if partition not in self._loops:
                self._loops[partition] = self._loop(partition)
                self._loops[partition].start()

    async def _release(self, partitions: Iterable[TopicPartition]) -> None:
        """Finishes what is in hand on these partitions and commits, before anybody else gets them."""
        closing = [self._loops[partition] for partition in partitions if partition in self._loops]
        await asyncio.gather(*(loop.close(self._around.drain) for loop in closing))
        for loop in closing:
            self._loops.pop(loop.assignment.partition, None)
            with suppress(KeyError):
                metrics.BUS_LAG.remove(self._group, loop.assignment.topic.name, str(loop.assignment.partition.partition))

    def _loop(self, partition: TopicPartition) -> PartitionLoop:
        topic = self._topic(partition)
        name = self._around.kafka.logical(partition.topic)
        assignment = Assignment(self._joined.consumer, partition, topic, name, self._group)
        if self._mode(topic) is Mode.TRANSACTIONAL and self._around.database is not None:
            workshop = self._workshop(self._around.database)
            if self._together is None:
                self._together = Together(self._group, workshop)
            return TransactionalLoop(assignment, self._gate, workshop, self._together, on_fatal=self._around.on_fatal)
        return StatelessLoop(assignment, self._gate, self._bench, high_water=4 * self._around.kafka.window, on_fatal=self._around.on_fatal)

    def _workshop(self, database: Database) -> Workshop:
        around, retry = self._around, self._around.kafka.retry
        limits = HandlerLimits(
            retry.handler_seconds.of(self.name),
            retry.attempts,
            timedelta(seconds=retry.initial_seconds),
            timedelta(seconds=retry.maximum_seconds),
            retry.parked_events,
        )
        return Workshop(
            around.service,
            database,
            self._registry,
            self._in_flight,
            around.quarantine,
            around.kafka.batch_records,
            self._bench.commit_every,
            limits,
            self._guard,
            timedelta(days=retry.keep_days),
        )


class _Membership(ConsumerRebalanceListener):  # type: ignore[misc]
    """One stay in the group: drains before a partition goes (facts: FastStream does not), and starts loops when one comes.

    Once it is over, whatever its client may still say has no effect.
    """

    def __init__(self, owner: Consumer) -> None:
        self._owner = owner
        self.over = False
        self.feed = owner._new_feed(self)

    async def receive(self, records: tuple[Record, ...]) -> None:
        if not self.over:
            await self._owner._receive(records)

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        if not self.over:
            await self._owner._release(revoked)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        if not self.over:
            await self._owner._assign(assigned)
