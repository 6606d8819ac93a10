"""A model of Kafka and of the parts of aiokafka that the bus uses.

Modelled: partitions with gaps in their offsets; idempotent producers with one sequence per partition, so that a record that was given up
leaves a gap after which the broker refuses that partition; acknowledgements that are lost or late; groups with generations, heartbeats,
session time-outs and eager rebalances; commits that fail; long polls; a broker that cannot be reached or has no leader.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    LeaderNotAvailableError,
    OutOfOrderSequenceNumber,
    UnknownError,
)
from simulation.loop import CURRENT, WORLD, SimulationLoop

_RETRY_SECONDS: Final = 0.1
_BATCH: Final = 4
_POLL: Final = 6
_LONG_POLL_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record as a consumer gets it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


@dataclass(slots=True)
class Log:
    """One partition."""

    records: list[LogRecord] = field(default_factory=list)
    end: int = 0
    sequences: dict[int, int] = field(default_factory=dict)
    """The next sequence of each producer."""


@dataclass(slots=True)
class Member:
    """One member of a group, as the coordinator knows it."""

    name: str
    session_seconds: float
    rebalance_seconds: float
    seen: float
    joining: asyncio.Future[Any] | None = None


@dataclass(slots=True)
class Group:
    """One consumer group."""

    members: dict[str, Member] = field(default_factory=dict)
    generation: int = 0
    preparing: bool = False
    deadline: float = 0.0
    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    topics: tuple[str, ...] = ()


class Cluster:
    """The broker, its coordinator, and what the network does to both."""

    def __init__(self, loop: SimulationLoop, chance: random.Random, topics: dict[str, int]) -> None:
        self.loop = loop
        self.chance = chance
        self.logs = {TopicPartition(name, number): Log() for name, count in topics.items() for number in range(count)}
        self.partitions = dict(topics)
        self.groups: dict[str, Group] = defaultdict(Group)
        self.reachable = True
        self.led = True
        self.slowness = 0.004
        self.loses_acknowledgements = 0.0
        self.refuses_records = 0.0
        """Share of produce requests that end in an error that is not retried."""
        self.fails_commits = 0.0
        self.gaps = 0.0
        """Share of appended records before which an offset is left out, as compaction and aborted transactions do."""
        self.evictions = 0
        """Members that the coordinator took for dead."""
        self._next_producer = 0
        self._polling: list[asyncio.Future[None]] = []

    # --- network ----------------------------------------------------------------------------------
    def latency(self) -> float:
        """Seconds of one round trip."""
        return self.chance.random() * self.slowness

    async def ask(self, request: Callable[[], Any]) -> Any:
        """One round trip. Raises KafkaConnectionError when the broker cannot be reached."""
        process = CURRENT.get()
        if process is not None and not process.alive:
            await self.loop.create_future()
        answer = self.loop.create_future()

        def tell(result: Any) -> None:
            if not answer.done():
                answer.set_result(result)

        def serve() -> None:
            """Also when nobody waits for the answer any longer: what was sent arrives."""
            try:
                result = request() if self.reachable else _refuse_connection()
            except Exception as error:  # noqa: BLE001
                if not answer.done():
                    answer.set_exception(error)
                return
            if asyncio.isfuture(result):
                result.add_done_callback(lambda done: tell(done.result()), context=WORLD)
            else:
                tell(result)

        self.loop.call_later(self.latency(), serve, context=WORLD)
        return await answer

    # --- logs -------------------------------------------------------------------------------------
    def append(self, partition: TopicPartition, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]) -> int:
        """One record at the end; returns its offset."""
        log = self.logs[partition]
        if self.gaps and self.chance.random() < self.gaps:
            log.end += 1
        offset = log.end
        log.end = offset + 1
        stamp = int(self.loop.wall_time() * 1000)
        log.records.append(LogRecord(partition.topic, partition.partition, offset, stamp, key, value, headers))
        polling, self._polling = self._polling, []
        for waiting in polling:
            if not waiting.done():
                waiting.set_result(None)
        return offset

    def place(self, topic: str, key: bytes | None) -> TopicPartition:
        """Where a key goes."""
        return TopicPartition(topic, zlib.crc32(key or b"") % self.partitions[topic])

    def new_producer(self) -> int:
        """A producer's id."""
        self._next_producer += 1
        return self._next_producer

    def produce(self, producer: int, partition: TopicPartition, sequence: int, records: Sequence[Outgoing]) -> int:
        """Appends a batch unless it is a repeat. Raises OutOfOrderSequenceNumber after a gap."""
        log = self.logs[partition]
        expected = log.sequences.get(producer, 0)
        if sequence > expected:
            raise OutOfOrderSequenceNumber
        if sequence < expected:
            return -1
        log.sequences[producer] = sequence + len(records)
        offsets = [self.append(partition, record.key, record.value, record.headers) for record in records]
        return offsets[0]

    def fetch(self, wanted: dict[TopicPartition, int], limit: int) -> list[LogRecord]:
        """Records from these positions on."""
        found: list[LogRecord] = []
        for partition, position in wanted.items():
            log = self.logs[partition]
            start = len(log.records)
            while start and log.records[start - 1].offset >= position:
                start -= 1
            found += log.records[start : start + limit]
        return found

    async def grown(self) -> None:
        """Returns when a record was appended somewhere, or after the longest poll."""
        waiting = self.loop.create_future()
        self._polling.append(waiting)
        self.loop.call_later(_LONG_POLL_SECONDS, lambda: waiting.done() or waiting.set_result(None), context=WORLD)
        await waiting

    # --- groups -----------------------------------------------------------------------------------
    def join(self, name: str, member: Member) -> asyncio.Future[Any]:
        """Answered with (generation, partitions) when every member has joined, or the rebalance time-out has passed."""
        group = self.groups[name]
        known = group.members.setdefault(member.name, member)
        known.seen = self.loop.time()
        self._prepare(name)
        known.joining = self.loop.create_future()
        answer = known.joining
        self._complete(name)
        return answer

    def heartbeat(self, name: str, member: str, generation: int) -> bool:
        """Whether the member may go on; else it has to join again."""
        group = self.groups[name]
        known = group.members.get(member)
        if known is None or generation != group.generation:
            return False
        known.seen = self.loop.time()
        return not group.preparing

    def leave(self, name: str, member: str) -> None:
        """At once, so that the others need not wait."""
        group = self.groups[name]
        if group.members.pop(member, None) is not None:
            self._prepare(name)
            self._complete(name)

    def commit(self, name: str, member: str, generation: int, offsets: dict[TopicPartition, int]) -> None:
        """Raises CommitFailedError for a member of an older generation."""
        group = self.groups[name]
        if member not in group.members or generation != group.generation:
            raise CommitFailedError("the group has gone on")
        if self.fails_commits and self.chance.random() < self.fails_commits:
            raise UnknownError("the commit failed")
        group.members[member].seen = self.loop.time()
        group.offsets.update(offsets)

    def _prepare(self, name: str) -> None:
        group = self.groups[name]
        if not group.preparing and group.members:
            group.preparing = True
            group.deadline = self.loop.time() + max(member.rebalance_seconds for member in group.members.values())
            self.loop.call_later(0.5, self._complete, name, context=WORLD)

    def _complete(self, name: str) -> None:
        group, now = self.groups[name], self.loop.time()
        if not group.preparing:
            return
        for member in list(group.members.values()):
            if member.joining is None and (now >= group.deadline or now - member.seen > member.session_seconds):
                del group.members[member.name]
                self.evictions += 1
        waiting = [member for member in group.members.values() if member.joining is None]
        if waiting:
            self.loop.call_later(0.5, self._complete, name, context=WORLD)
            return
        group.preparing = False
        group.generation += 1
        members = sorted(group.members.values(), key=lambda member: member.name)
        mine: dict[str, list[TopicPartition]] = {member.name: [] for member in members}
        partitions = sorted(partition for partition in self.logs if partition.topic in group.topics)
        for number, partition in enumerate(partitions if members else ()):
            mine[members[(number + group.generation) % len(members)].name].append(partition)
        for member in members:
            answer, member.joining = member.joining, None
            member.seen = now
            if answer is not None and not answer.done():
                answer.set_result((group.generation, mine[member.name]))
            self._watch(name, member)

    def _watch(self, name: str, member: Member) -> None:
        generation = self.groups[name].generation

        def look() -> None:
            group = self.groups[name]
            if group.members.get(member.name) is not member or group.generation != generation:
                return
            if member.joining is not None:
                member.seen = self.loop.time()  # it waits for the others: nobody expects heartbeats
            quiet = self.loop.time() - member.seen
            if quiet > member.session_seconds:
                del group.members[member.name]
                self.evictions += 1
                self._prepare(name)
                self._complete(name)
            else:
                self.loop.call_later(member.session_seconds - quiet + 0.01, look, context=WORLD)

        self.loop.call_later(member.session_seconds + 0.01, look, context=WORLD)


def _refuse_connection() -> None:
    raise KafkaConnectionError("no broker answers")


# --- producer -------------------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Outgoing:
    """One record on its way."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    sent: asyncio.Future[Any]


class SimulatedBatch:
    """aiokafka's BatchBuilder: full after a few records."""

    def __init__(self) -> None:
        self.records: list[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes]]]] = []
        self._closed = False

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> object | None:
        if self._closed or len(self.records) == _BATCH:
            return None
        self.records.append((key, value, headers))
        return self

    def close(self) -> None:
        self._closed = True


class SimulatedProducer:
    """AIOKafkaProducer with idempotence: one batch per partition on its way, repeated until it is acknowledged or given up."""

    def __init__(self, cluster: Cluster, **options: Any) -> None:
        self._cluster = cluster
        self._ttl = options.get("request_timeout_ms", 40_000) / 1000
        self._id = -1
        self._waiting: dict[TopicPartition, deque[Outgoing]] = defaultdict(deque)
        self._sequences: dict[TopicPartition, int] = defaultdict(int)
        self._senders: dict[TopicPartition, asyncio.Task[None]] = {}
        self._closed = False
        self._ended = False
        self._on_their_way: dict[TopicPartition, list[Outgoing]] = {}
        self.client = self
        self._sender = SimpleNamespace(sender_task=SimpleNamespace(cancel=self._end))
        self._message_accumulator = SimpleNamespace(fail_all=self._fail_all)

    async def start(self) -> None:
        self._id = await self._cluster.ask(self._cluster.new_producer)

    async def stop(self) -> None:
        self._closed = True
        if self._senders:
            await asyncio.wait(self._senders.values())

    async def flush(self) -> None:
        if self._senders:
            await asyncio.wait(self._senders.values())

    async def force_metadata_update(self) -> bool:
        await self._cluster.ask(lambda: None)
        return True

    async def partitions_for(self, topic: str) -> set[int]:
        return set(range(self._cluster.partitions[topic]))

    async def send(
        self,
        topic: str,
        value: bytes | None = None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[Any]:
        place = TopicPartition(topic, partition) if partition is not None else self._cluster.place(topic, key)
        return self._hand_over(place, key, value, headers)

    def create_batch(self) -> SimulatedBatch:
        return SimulatedBatch()

    async def send_batch(self, batch: SimulatedBatch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        place = TopicPartition(topic, partition)
        while place in self._senders:
            await asyncio.wait([self._senders[place]])
        return [self._hand_over(place, *record) for record in batch.records][-1]

    def _hand_over(
        self, place: TopicPartition, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> asyncio.Future[Any]:
        if self._closed or self._ended:
            raise KafkaError("the producer takes nothing any more")
        sent = self._cluster.loop.create_future()
        self._waiting[place].append(Outgoing(key, value, list(headers), sent))
        if place not in self._senders:
            self._senders[place] = self._cluster.loop.create_task(self._sending(place))
        return sent

    def _end(self) -> None:
        """The sender's task is cancelled: what is on its way gets its answer, nothing else is sent."""
        self._ended = True

    def _fail_all(self, error: Exception) -> None:
        for waiting in self._waiting.values():
            _fail(waiting, error)
            waiting.clear()
        for batch in self._on_their_way.values():
            _fail(batch, error)

    async def _sending(self, place: TopicPartition) -> None:
        waiting = self._waiting[place]
        while waiting:
            await asyncio.sleep(0)
            if self._ended:
                break
            batch = [waiting.popleft() for _ in range(min(_BATCH, len(waiting)))]
            sequence = self._sequences[place]
            self._sequences[place] += len(batch)
            self._on_their_way[place] = batch
            await self._deliver(place, sequence, batch)
            del self._on_their_way[place]
        del self._senders[place]

    async def _deliver(self, place: TopicPartition, sequence: int, batch: list[Outgoing]) -> None:
        try:
            offset = await self._acknowledged(place, sequence, batch)
        except KafkaError as error:
            _fail(batch, error)
            return
        for number, record in enumerate(batch):
            if not record.sent.done():
                record.sent.set_result(SimpleNamespace(partition=place.partition, offset=offset + number))

    async def _acknowledged(self, place: TopicPartition, sequence: int, batch: list[Outgoing]) -> int:
        """Repeats until there is an answer. Raises LeaderNotAvailableError when there is no leader for too long."""
        cluster = self._cluster
        began = cluster.loop.time()
        while not self._ended and (cluster.led or cluster.loop.time() - began <= self._ttl):
            if cluster.led:
                try:
                    return int(await cluster.ask(lambda: self._offer(place, sequence, batch)))
                except (KafkaConnectionError, KafkaTimeoutError):
                    pass  # no answer: it may be in the log already, which its sequence tells
            await asyncio.sleep(_RETRY_SECONDS)
        raise LeaderNotAvailableError

    def _offer(self, place: TopicPartition, sequence: int, batch: list[Outgoing]) -> int:
        cluster = self._cluster
        if cluster.refuses_records and cluster.chance.random() < cluster.refuses_records:
            raise UnknownError("the broker could not")
        offset = cluster.produce(self._id, place, sequence, batch)
        if cluster.loses_acknowledgements and cluster.chance.random() < cluster.loses_acknowledgements:
            raise KafkaTimeoutError("the acknowledgement was lost")
        return offset


def _fail(records: Iterable[Outgoing], error: Exception) -> None:
    for record in records:
        if not record.sent.done():
            record.sent.set_exception(error)
            record.sent.exception()  # nobody need look at it


class SimulatedAdmin:
    """AIOKafkaAdminClient, as far as the directory of topics needs it."""

    def __init__(self, cluster: Cluster, **_: Any) -> None:
        self._cluster = cluster

    async def start(self) -> None:
        await self._cluster.ask(lambda: None)

    async def close(self) -> None:
        """Nothing is open."""

    async def list_topics(self) -> list[str]:
        return list(await self._cluster.ask(lambda: list(self._cluster.partitions)))


# --- consumer -------------------------------------------------------------------------------------------------------------------------
class SimulatedConsumer:
    """AIOKafkaConsumer and the loop of FastStream around it: membership, positions, fetching."""

    def __init__(
        self,
        cluster: Cluster,
        kafka: Any,
        client_id: str,
        group: str,
        topics: tuple[str, ...],
        *,
        listener: Any,
        receive: Callable[..., Any],
    ) -> None:
        self._cluster = cluster
        self._group = group
        self._topics = topics
        self._listener = listener
        self._receive = receive
        self._member = Member(client_id, kafka.session_timeout_seconds, kafka.rebalance_timeout_seconds, 0.0)
        self._heartbeat = kafka.heartbeat_milliseconds / 1000
        self._generation = -1
        self._assigned: set[TopicPartition] = set()
        self._positions: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._changed = asyncio.Event()
        self._joined = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Returns when partitions are assigned."""
        self._tasks = [asyncio.create_task(self._membership()), asyncio.create_task(self._fetching())]
        await self._joined.wait()

    async def stop(self) -> None:
        """Ends fetching and leaves the group."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        try:
            await self._cluster.ask(lambda: self._cluster.leave(self._group, self._member.name))
        except KafkaConnectionError:
            return

    # --- membership -------------------------------------------------------------------------------
    async def _membership(self) -> None:
        while True:
            try:
                await self._join()
                while await self._beat():
                    pass
            except KafkaConnectionError:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _beat(self) -> bool:
        await asyncio.sleep(self._heartbeat)
        try:
            alive: bool = await self._cluster.ask(lambda: self._cluster.heartbeat(self._group, self._member.name, self._generation))
        except KafkaConnectionError:
            return True
        return alive

    async def _join(self) -> None:
        beating = asyncio.create_task(self._beat_on())
        try:
            await self._listener.on_partitions_revoked(set(self._assigned))
        finally:
            beating.cancel()
        cluster, group = self._cluster, self._cluster.groups[self._group]
        group.topics = self._topics
        self._member.joining = None
        generation, partitions = await cluster.ask(lambda: cluster.join(self._group, self._member))
        committed = await cluster.ask(lambda: {partition: group.offsets.get(partition, 0) for partition in partitions})
        self._generation, self._assigned = generation, set(partitions)
        self._positions, self._paused = committed, set()
        await self._listener.on_partitions_assigned(set(partitions))
        self._joined.set()
        self._changed.set()

    async def _beat_on(self) -> None:
        """While a partition is drained the member goes on showing that it lives."""
        while True:
            await self._beat()

    # --- fetching ---------------------------------------------------------------------------------
    async def _fetching(self) -> None:
        while True:
            self._changed.clear()
            wanted = {tp: self._positions[tp] for tp in sorted(self._assigned - self._paused)}
            if not wanted:
                await self._changed.wait()
                continue
            try:
                found = await self._cluster.ask(lambda wanted=wanted: self._cluster.fetch(wanted, self._cluster.chance.randint(1, _POLL)))
            except KafkaConnectionError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            kept = [record for record in found if self._takes(record, wanted)]
            for record in kept:
                self._positions[TopicPartition(record.topic, record.partition)] = record.offset + 1
            if kept:
                await self._receive(tuple(kept))
            elif not self._changed.is_set():
                await self._wait()

    def _takes(self, record: LogRecord, wanted: dict[TopicPartition, int]) -> bool:
        partition = TopicPartition(record.topic, record.partition)
        if partition not in self._assigned or partition in self._paused:
            return False
        position = self._positions[partition]
        return record.offset >= position and wanted[partition] <= position

    async def _wait(self) -> None:
        tasks = {asyncio.create_task(self._cluster.grown()), asyncio.create_task(self._changed.wait())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    # --- what the bus calls -----------------------------------------------------------------------
    def assignment(self) -> set[TopicPartition]:
        return self._assigned

    def pause(self, *partitions: TopicPartition) -> None:
        self._check(partitions)
        self._paused.update(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        self._check(partitions)
        self._paused.difference_update(partitions)
        self._changed.set()

    def paused(self) -> set[TopicPartition]:
        return self._paused

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._check((partition,))
        self._positions[partition] = offset
        self._changed.set()

    def highwater(self, partition: TopicPartition) -> int:
        return self._cluster.logs[partition].end

    async def position(self, partition: TopicPartition) -> int:
        self._check((partition,))
        return self._positions[partition]

    async def committed(self, partition: TopicPartition) -> int | None:
        offset: int | None = await self._patiently(lambda: self._cluster.groups[self._group].offsets.get(partition))
        return offset

    async def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return dict(await self._cluster.ask(lambda: dict.fromkeys(partitions, 0)))

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return dict(await self._cluster.ask(lambda: {partition: self._cluster.logs[partition].end for partition in partitions}))

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        self._check(offsets)
        generation = self._generation
        await self._patiently(lambda: self._cluster.commit(self._group, self._member.name, generation, offsets))

    async def _patiently(self, request: Callable[[], Any]) -> Any:
        """As aiokafka does, as long as the broker cannot be reached."""
        while True:
            try:
                return await self._cluster.ask(request)
            except KafkaConnectionError:
                await asyncio.sleep(_RETRY_SECONDS)

    def _check(self, partitions: Any) -> None:
        for partition in partitions:
            if partition not in self._assigned:
                raise IllegalStateError(f"{partition} is not assigned")


class SimulatedFeed:
    """The bus's Feed."""

    def __init__(self, consumer: SimulatedConsumer) -> None:
        self.consumer = consumer

    async def start(self) -> None:
        await self.consumer.start()

    async def stop(self) -> None:
        await self.consumer.stop()
