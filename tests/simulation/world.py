"""One world per seed: replicas of a service on the real bus, on simulated servers, with faults; and what it looks like afterwards."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, Final
from unittest.mock import patch

from aiokafka import TopicPartition
from pydantic import SecretStr
from simulation import statements
from simulation.kafka import Cluster, LogRecord, SimulatedAdmin, SimulatedConsumer, SimulatedFeed, SimulatedProducer
from simulation.loop import CURRENT, Process, ProcessKilledError, SimulationLoop
from simulation.postgres import Server, Session, SimulatedDatabase
from simulation.scenario import Event, Plan
from simulation.statements import APPLIED, APPLY, LOCK_KEY, SERVICE

import tessera.resilience.retry
from tessera.bus import BatchTransaction, Bus, Emitter, Received, Transaction, consistency
from tessera.bus.applying import MAXIMUM_ATTEMPTS
from tessera.bus.events import Position
from tessera.bus.freshness import seen_in
from tessera.bus.outbox import unpack_headers
from tessera.bus.partitions import PASSING
from tessera.bus.settings import KafkaSettings, ServiceSettings
from tessera.contracts.catalogue import consumed_by, dead_letter_topic
from tessera.contracts.errors import FatalError, InvalidError, RetryableError
from tessera.contracts.events import (
    DocumentPublished,
    EmbeddingRequested,
    EntityPublished,
    FreshnessInspected,
    GenerationTokenized,
    IngestionInspected,
    MemoryRecorded,
    MessagePublished,
    RecallCompleted,
    RecallRequested,
    RelationPublished,
)
from tessera.contracts.ids import body_digest, identity_digest
from tessera.storage import PostgresSettings
from tessera.testkit.history import Findings, History, Outgoing, Sent, check

TENANT: Final = "acme"
INPUT: Final = "ingest"
OUTPUT: Final = "memory.recorded"
QUESTIONS: Final = "recall.requested"
LETTERS: Final = dead_letter_topic(INPUT, SERVICE)
GROUP: Final = f"{SERVICE}.ingestion"
PATIENCE_SECONDS: Final = 240.0
"""Of virtual time, for everything to be done once the faults are over."""
_SOURCE: Final = "/simulation"
_MOMENT: Final = datetime(2026, 1, 1, tzinfo=UTC)


class SimulatedSettings(ServiceSettings, service=SERVICE):
    """Nothing of its own."""


@cache
def _settings() -> SimulatedSettings:
    word = SecretStr("unused")
    postgres = PostgresSettings(worker_password=word, client_password=word, owner_password=word, breaker_reset_seconds=1.0)
    return SimulatedSettings(instance="unnamed", postgres=postgres)


@dataclass(slots=True)
class Verdict:
    """What a run showed."""

    seed: int
    findings: Findings
    violations: list[str]
    """Rules that were broken on the way."""
    steps: int
    virtual_seconds: float
    story: str
    """What happened when, and a line that differs where anything did."""

    @property
    def clean(self) -> bool:
        """Whether everything was as promised."""
        return self.findings.clean and not self.violations

    def __str__(self) -> str:
        lines = [f"seed {self.seed}", *(f"violation: {line}" for line in self.violations)]
        return "\n".join(lines if self.findings.clean else [*lines, str(self.findings)])


class Replica:
    """One process of the service."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self.process = Process(name)
        self.bus: Bus | None = None
        self._stopping = asyncio.Event()
        self._dead = asyncio.Event()
        self.process.on_death.append(self._dead.set)
        self.task = world.loop.run_in(self.process, self._live())

    async def _live(self) -> None:
        try:
            await self._run()
        except Exception as error:  # noqa: BLE001
            self._world.violations.append(f"{self.name} broke: {error!r}")

    async def _run(self) -> None:
        world = self._world
        kafka = KafkaSettings.model_construct(**{**vars(_settings().kafka), **world.plan.kafka})
        settings = _settings().model_copy(update={"instance": self.name, "kafka": kafka})
        self.bus = Bus(settings, SimulatedDatabase(SERVICE, settings.postgres, world.server), on_fatal=self._fatal)
        world.register(self.bus)
        while True:
            try:
                await self.bus.connect()
                break
            except RetryableError:
                await asyncio.sleep(0.2)
        await self.bus.start()
        await self._stopping.wait()
        await self.bus.drain()
        await self.bus.stop()

    def _fatal(self, error: FatalError) -> None:
        self._world.violations.append(f"{self.name} ended with a fatal error: {error}")

    async def stop(self) -> None:
        """SIGTERM: drains and leaves. Returns when it has left, or died of it."""
        self._stopping.set()
        dead = asyncio.create_task(self._dead.wait())
        await asyncio.wait({self.task, dead}, return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.alive:
            self._world.deaths += 1
            self._world.loop.kill(self.process)


class World:
    """Everything of one run. This one ingests: transactional, each event one row and one outgoing event."""

    input = INPUT
    group = GROUP

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.chance = random.Random(f"world {plan.seed}")
        self.loop = SimulationLoop(self.chance, shuffled=plan.shuffled)
        topics = {self.input: plan.partitions, OUTPUT: 2, LETTERS: 1, "refused": 1}
        self.server = Server(self.loop, random.Random(f"postgres {plan.seed}"), statements.STATEMENTS)
        self.server.slowness = plan.storage_latency
        self.cluster = Cluster(self.loop, random.Random(f"kafka {plan.seed}"), {**_other_topics(), **topics})
        self.cluster.gaps = plan.gaps
        self.replicas: dict[str, Replica] = {}
        self.effects: list[str] = []
        self.violations: list[str] = []
        self.deaths = 0
        self.outages = 0
        self.tries: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """How often the handler of an event failed in a way that no error class explains."""
        self.trace: list[str] = []
        self.reached: Counter[str] = Counter()
        self._positions: dict[Any, int] = {}
        self._told: set[str] = set()
        """Ids of events that were refused, as far as that is committed."""
        self._born = 0
        self.server.commits.append(self._observe)

    # --- life -------------------------------------------------------------------------------------
    def start_replica(self) -> Replica:
        """One more process."""
        self._born += 1
        replica = Replica(self, f"r{self._born}")
        self.replicas[replica.name] = replica
        return replica

    def alive(self) -> list[Replica]:
        """Those that run, frozen ones included."""
        return [replica for replica in self.replicas.values() if replica.process.alive and not replica.task.done()]

    def run(self) -> Verdict:
        """The whole run."""
        asyncio.set_event_loop(self.loop)
        with self._patched():
            try:
                self.loop.run_until_complete(self._story())
                verdict = self._judge()
            except RuntimeError as error:
                self.violations.append(str(error))
                verdict = self._judge()
            finally:
                self._end()
        return verdict

    async def _story(self) -> None:
        for _ in range(self.plan.replicas):
            self.start_replica()
        acts = [asyncio.create_task(self._produce(event)) for event in self.plan.events]
        acts += [asyncio.create_task(fault.strike(self)) for fault in self.plan.faults]
        acts.append(asyncio.create_task(self._read()))
        await asyncio.gather(*acts)
        self._heal()
        await self._quiet()
        await asyncio.gather(*(replica.stop() for replica in self.alive()))
        if self.unfinished():  # somebody may have died while stopping
            await self._quiet()
            await asyncio.gather(*(replica.stop() for replica in self.alive()))

    async def _produce(self, event: Event) -> None:
        await asyncio.sleep(event.at)
        for _ in range(event.copies):
            self.cluster.append(self.cluster.place(self.input, event.key.encode()), event.key.encode(), *self.record(event))
            await asyncio.sleep(self.chance.random() * 0.5)

    async def _read(self) -> None:
        """A client that asks now and then whether a write is visible, and looks in the same snapshot."""
        database = SimulatedDatabase(SERVICE, _settings().postgres, self.server)
        for _ in range(self.plan.reads):
            await asyncio.sleep(self.chance.random() * 2.0)
            records = self._records(INPUT)
            if records:
                with suppress(*PASSING):
                    await self._look_for(self.chance.choice(records), database)

    async def _look_for(self, record: LogRecord, database: SimulatedDatabase) -> None:
        event = _header(record, "ce_id")
        identity = identity_digest(TENANT, _SOURCE, event)
        write = consistency.Write(identity, body_digest(record.value or b""), Position(INPUT, record.partition, record.offset))
        end = consistency.Target(ends={(INPUT, record.partition): record.offset + 1})
        for target in (consistency.Target(writes=[write]), end):
            async with database.reading(TENANT) as connection:
                seen = await seen_in(connection, GROUP, TENANT, [INPUT], target)
                applied = {row.event_id for row in await connection.execute(APPLIED)}
            satisfied = consistency.judge(target, seen).standing is consistency.Standing.SATISFIED
            if satisfied and event not in applied and event not in self._told:
                self.violations.append(f"a reader was told that {event} is visible, and did not find it")

    def _heal(self) -> None:
        """From now on nothing goes wrong, and at least one replica lives."""
        self.server.start()
        self.server.loses_answers = 0.0
        cluster = self.cluster
        cluster.reachable = cluster.led = True
        cluster.loses_acknowledgements = cluster.refuses_records = cluster.fails_commits = 0.0
        for replica in self.alive():
            if replica.process.frozen:
                self.loop.thaw(replica.process)
        if not self.alive():
            self.start_replica()

    async def _quiet(self) -> None:
        deadline = self.loop.time() + PATIENCE_SECONDS
        while left := self.unfinished():
            if self.loop.time() > deadline:
                self.violations += [f"not within {PATIENCE_SECONDS:.0f} s: {line}" for line in left]
                return
            await asyncio.sleep(0.5)
            if not self.alive():
                self.start_replica()

    def unfinished(self) -> list[str]:
        """What is still to be done."""
        left = [f"{len(self.server.tables['outbox'])} rows in the outbox"] if self.server.tables["outbox"] else []
        left += [f"{place} is parked" for place, row in self.server.tables["parked"].items() if row.state in ("waiting", "stuck")]
        for partition, log in self.cluster.logs.items():
            if partition.topic != self.input or not log.records:
                continue
            end = log.records[-1].offset + 1
            left += self.behind(partition, end)
            offset = self.cluster.groups[self.group].offsets.get(partition, 0)
            if offset < end:
                left.append(f"the group's offset of {partition} is {offset} of {end}")
        return left

    def behind(self, partition: TopicPartition, end: int) -> list[str]:
        """What the stored position of a partition lacks."""
        row = self.server.tables["consumer_position"].get((GROUP, INPUT, partition.partition))
        return [f"{partition} is at {row and row.next_offset} of {end}"] if row is None or row.next_offset < end else []

    # --- observing --------------------------------------------------------------------------------
    def _observe(self, session: Session) -> None:
        for row in session._writes["effect"].values():
            if row is not None:
                self.effects.append(row.event_id)
        for row in session._writes["outbox"].values():
            if row is not None and row.topic == LETTERS:
                self._told.add(_header_of(row.headers, "ce_id"))
        for key, row in session._writes["consumer_position"].items():
            if row is not None:
                self._moved(key, self._positions.get(key, 0), row.next_offset)
        for key, row in session._writes["batch_mark"].items():
            if row is not None and row.attempts > 1 + self._presumed_deaths() + self._failures(key, row):
                self.violations.append(f"the mark of {key} counts {row.attempts} attempts after {self._presumed_deaths()} deaths")

    def _moved(self, key: tuple[Any, ...], before: int, after: int) -> None:
        """The invariant of docs/delivery.md and docs/retries.md: below the position every event is applied, refused, or has a row."""
        if after < before:
            self.violations.append(f"the position of {key} went back from {before} to {after}")
        self._positions[key] = after
        records = [(record.offset, _header(record, "ce_id")) for record in self.cluster.logs[TopicPartition(key[1], key[2])].records]
        known = {*self.effects, *self._told, *(event for offset, event in records if (*key, offset) in self.server.tables["parked"])}
        for offset, event in records:
            if before <= offset < after and event not in known:
                self.violations.append(f"the position of {key} has passed {event}, which is neither applied nor refused nor parked")

    def _presumed_deaths(self) -> int:
        """How often a replica died, or had to be taken for dead by whoever came after it."""
        return self.deaths + self.cluster.evictions + self.outages

    def _failures(self, key: tuple[Any, ...], row: Any) -> int:
        """How often a handler failed in a way that counts: in these events, and once for having been in a batch with another."""
        own = shared = 0
        for record in self.cluster.logs[TopicPartition(key[1], key[2])].records:
            times = self.failures[_header(record, "ce_id")]
            shared = max(shared, min(times, 1))
            own += times if row.first_offset <= record.offset <= row.last_offset else 0
        return own + shared

    def _judge(self) -> Verdict:
        left = [*self.unfinished(), *(f"the mark {key}: {row}" for key, row in self.server.tables["batch_mark"].items())]
        findings = check(self.history(left))
        refusable = {event.id for event in self.plan.events if event.is_refusable}
        if self._presumed_deaths() + bool(self.failures) < MAXIMUM_ATTEMPTS:
            self.violations += [f"{event} was refused without a reason" for event in self._letters() if event not in refusable]
        self.violations += [f"something broke: {context.get('message')} {context.get('exception')!r}" for context in self._broken()]
        end = f"{self.loop.time():.9f} s, {self.loop.steps} steps, {len(self.effects)} effects, {len(self._records(OUTPUT))} records"
        story = "\n".join([*self.trace, end])
        return Verdict(self.plan.seed, findings, self.violations, self.loop.steps, self.loop.time(), story)

    def history(self, left: list[str]) -> History:
        """What was promised, and what is found."""
        letters = self._letters()
        again = {event.id for event in self.plan.events if event.copies > 1}.intersection(letters, self.effects)
        sent = [Sent(event.id, f"{event.id} alone" if event.id in again else event.key) for event in self._sent()]
        return History(
            sent=sent,
            acknowledged=[event.id for event in sent],
            refused=set(letters) - again,  # of which one copy was refused after three deaths and the next one applied, as if replayed
            effects=self.effects,
            outgoing=[
                Outgoing(_header(record, "ce_id"), _header(record, "ce_correlationid"), record.value) for record in self._records(OUTPUT)
            ],
            unfinished=left,
        )

    def _broken(self) -> Iterator[dict[str, Any]]:
        for context in self.loop.broken:
            killed = context.get("exception") is None or isinstance(context["exception"], ProcessKilledError)
            if not killed:
                yield context

    def _records(self, topic: str) -> list[LogRecord]:
        return [record for partition, log in self.cluster.logs.items() if partition.topic == topic for record in log.records]

    def _sent(self) -> list[Sent]:
        return [Sent(_header(record, "ce_id"), (record.key or b"").decode()) for record in self._records(self.input)]

    def _letters(self) -> list[str]:
        return [_header(record, "ce_id") for record in self._records(LETTERS)]

    # --- the service ------------------------------------------------------------------------------
    def register(self, bus: Bus) -> None:
        """The handlers."""
        ingestion = bus.consumer("ingestion")
        if self.plan.batched:
            ingestion.transactional_batch(MessagePublished)(self._apply_all)
        else:
            ingestion.transactional(MessagePublished)(self._apply)
        for other in (DocumentPublished, EntityPublished, RelationPublished):
            ingestion.transactional(other)(_ignore)

    def record(self, event: Event) -> tuple[bytes, list[tuple[str, bytes]]]:
        """Value and headers of an event."""
        return _body(event.key, event.content), _headers(event.id, MessagePublished.event_type)

    async def _apply_all(self, events: Sequence[Received[MessagePublished]], batch: BatchTransaction) -> None:
        for event in events:
            await self._apply(event, batch.of(event))

    async def _apply(self, event: Received[MessagePublished], transaction: Transaction) -> None:
        key = event.data.conversation_id
        await transaction.connection.execute(LOCK_KEY, {"key": key})
        await transaction.connection.execute(APPLY, {"event_id": event.id, "key": key})
        recorded = MemoryRecorded(
            memory_id=event.id, kind="message", origin_id=event.id, occurred_at=_MOMENT, recorded_at=_MOMENT, importance=0.5, text="x"
        )
        await transaction.publish(recorded, step="recorded", key=key.encode())
        await self.trouble(event.id, str(event.data.content))

    async def trouble(self, event: str, content: str) -> None:
        kind, _, number = content.partition(" ")
        if kind == "invalid":
            raise InvalidError("not_wanted", "This content is not wanted.", "content")
        if kind == "slow":
            await asyncio.sleep(float(number))
        if kind == "retry" and self.tries[event] < int(number):
            self.tries[event] += 1
            raise RetryableError("not yet")
        if kind == "bug" and self.failures[event] < int(number):
            self.failures[event] += 1
            raise KeyError(content)
        if kind == "kill":
            self.die("its event")

    def die(self, why: str) -> None:
        """SIGKILL of the current process by its own step."""
        process = CURRENT.get()
        if process is not None and process.name in self.replicas:
            self.note(f"{process.name} dies of {why}")
            self.replicas[process.name].kill()
            raise ProcessKilledError

    def note(self, line: str) -> None:
        """For whoever looks at one seed."""
        self.trace.append(f"{self.loop.time():9.3f} {line}")

    def _reach(self, point: str) -> None:
        self.reached[point] += 1
        if (point, self.reached[point]) in self.plan.crashes:
            self.die(point)

    # --- plumbing ---------------------------------------------------------------------------------
    @contextmanager
    def _patched(self) -> Iterator[None]:
        cluster = self.cluster
        with ExitStack() as patches:
            for target, replacement in (
                ("time.monotonic", self.loop.time),
                ("time.time", self.loop.wall_time),
                ("tessera.bus.publisher.AIOKafkaProducer", partial(SimulatedProducer, cluster)),
                ("tessera.bus.topics.AIOKafkaAdminClient", partial(SimulatedAdmin, cluster)),
                ("tessera.bus.consumer.group_feed", self._feed),
                ("tessera.bus.relay._ROWS", random.Random(f"rows of the relay {self.plan.seed}").choice((1, 2, 3, 2_000))),
                ("tessera.bus.faults.reach", self._reach),
                ("tessera.bus.delivery.continued", _untraced),
                ("tessera.bus.delivery.bound", _untraced),
                ("tessera.bus.delivery.span", _untraced),
                ("tessera.bus.transaction.current_traceparent", lambda: None),
            ):
                patches.enter_context(patch(target, replacement))
            patches.enter_context(patch.object(tessera.resilience.retry, "_RANDOM", random.Random(f"pauses {self.plan.seed}")))
            yield

    def _feed(self, kafka: KafkaSettings, client_id: str, group: str, *, topics: Any, pattern: Any, listener: Any, receive: Any) -> Any:
        read = topics or (INPUT,)
        return SimulatedFeed(SimulatedConsumer(self.cluster, kafka, client_id, group, tuple(read), listener=listener, receive=receive))

    def _end(self) -> None:
        """Everything that still runs is dropped without a word, as the processes of a machine that is switched off."""
        for replica in self.replicas.values():
            replica.process.alive = False
        asyncio.set_event_loop(None)
        self.loop._ready.clear()
        self.loop._scheduled.clear()
        self.loop.close()


def _untraced(*_: Any, **__: Any) -> Any:
    """Traces cost more than what is simulated."""
    return nullcontext()


class AnsweringWorld(World):
    """This one answers requests: repeatable, without a database of its own."""

    input = QUESTIONS
    group = f"{SERVICE}.chat"

    def register(self, bus: Bus) -> None:
        """The handlers."""
        chat = bus.consumer("chat")
        chat.replying(RecallRequested)(self._answer)
        for other in (EmbeddingRequested, FreshnessInspected, IngestionInspected, GenerationTokenized):
            chat.replying(other)(_ignore)

    async def _answer(self, event: Received[RecallRequested], emit: Emitter) -> None:
        await emit.reply(RecallCompleted(memories=()))
        await self.trouble(event.id, str(event.data.query))

    def record(self, event: Event) -> tuple[bytes, list[tuple[str, bytes]]]:
        """Value and headers of a request."""
        return _question(event.content), _headers(event.id, RecallRequested.event_type)

    def behind(self, partition: TopicPartition, end: int) -> list[str]:
        """There is no stored position."""
        return []

    def history(self, left: list[str]) -> History:
        """Every request has an answer, or a problem, perhaps both: it may be tried again."""
        sent = self._sent()
        answered = dict.fromkeys(_header(record, "ce_correlationid") for record in self._records("reply"))
        return History(sent=sent, acknowledged=[event.id for event in sent], effects=list(answered), unfinished=left, ordered=False)


def world_of(plan: Plan) -> World:
    """The world that a plan wants."""
    return (AnsweringWorld if plan.answering else World)(plan)


@cache
def _question(query: str) -> bytes:
    return RecallRequested(query=query, reply_partition=0).model_dump_json(exclude_none=True).encode()


async def _ignore(event: Received[Any], transaction: Transaction) -> None:
    """Other ingested types have no effect here."""


@cache
def _other_topics() -> dict[str, int]:
    return {"reply": 2, **{topic.name: 1 for topic in consumed_by(SERVICE)}}


@cache
def _body(conversation: str, content: str) -> bytes:
    return MessagePublished(conversation_id=conversation, role="user", content=content).model_dump_json(exclude_none=True).encode()


def _headers(event: str, event_type: str) -> list[tuple[str, bytes]]:
    attributes = {"specversion": "1.0", "id": event, "source": _SOURCE, "type": event_type, "tenantid": TENANT}
    return [(f"ce_{name}", value.encode()) for name, value in attributes.items()]


def _header_of(packed: str, name: str) -> str:
    return next((value.decode() for header, value in unpack_headers(packed) if header == name), "")


def _header(record: Any, name: str) -> str:
    return next((value.decode() for header, value in record.headers if header == name), "")


def simulate(seed: int, bug: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Verdict:
    """Runs the world of one seed; within `bug` the code under test is broken on purpose."""
    with bug():
        return world_of(Plan.of(seed)).run()
