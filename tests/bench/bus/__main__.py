"""`make bench-bus`: the real bus beside its floors, in one run. Progress on stderr, one JSON line last on stdout.

`python tests/bench/bus effect` only measures how long an effect takes.
Processor time counts Python, Postgres and the broker, in the figures of the bus and of its floors alike. Postgres syncs to disk.
"""

import asyncio
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import confluent_kafka
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from measuring import Stopwatch, cpu_seconds, machine, milliseconds, print_figures, progress

from tessera.bus import Bus
from tessera.bus.settings import ServiceSettings
from tessera.contracts.events import RecallFilter, RecallRequested
from tessera.local.environment import Addresses, common_environment
from tessera.local.kafka import KafkaLimits
from tessera.testkit import Stack, eventually_blocking, unique_kafka_prefix
from tessera.testkit.databases import PostgresDatabase, new_database

EVENTS = int(os.environ.get("BENCH_EVENTS", "200000"))
PARTITIONS = 4
BATCH = 1_000
RATE = 1_000
LATENCY_SECONDS = 20
REQUESTS = 1_000
STOPPED_SECONDS = int(os.environ.get("BENCH_STOPPED_SECONDS", "60"))
ROLES = Path(__file__).with_name("roles.py")
_SETTLED = timedelta(minutes=5)
_FARTHEST = 1.5
"""Times a floor may be slower than its parts, each measured by itself: beyond, the machine was too busy for the ratios to mean anything."""
_DDL = (
    "CREATE TABLE memory.bench_effect "
    "(position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id text, event_id text, content text)",
    "GRANT SELECT, INSERT ON memory.bench_effect TO tessera_memory_worker",
)
_NOTIFYING = (
    "CREATE FUNCTION memory.bench_told() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    # in pieces: a payload has 8,000 bytes at most, and a trigger that fails would have the batch handled one by one
    "PERFORM pg_notify('bench', string_agg(event_id, ',')) FROM (SELECT event_id, (row_number() OVER ()) / 200 AS piece FROM added) "
    "AS numbered GROUP BY piece; RETURN NULL; END $$",
    "CREATE TRIGGER bench_told AFTER INSERT ON memory.bench_effect REFERENCING NEW TABLE AS added "
    "FOR EACH STATEMENT EXECUTE FUNCTION memory.bench_told()",
)


@dataclass
class Ground:
    """The servers, a database and topics of this run."""

    stack: Stack
    database: PostgresDatabase
    prefix: str
    environment: dict[str, str] = field(default_factory=dict)

    def sql(self, query: str, *arguments: object) -> list[Any]:
        """Rows as the administrator sees them. Blocks."""

        async def run() -> list[Any]:
            connection = await asyncpg.connect(self.database.admin_url)
            try:
                return list(await connection.fetch(query, *arguments))
            finally:
                await connection.close()

        return uvloop.run(run())

    @property
    def servers(self) -> tuple[int, ...]:
        """Pids of Postgres and Kafka."""
        return tuple(self.servers_by_name.values())

    @property
    def servers_by_name(self) -> dict[str, int]:
        """Their pids by name."""
        found = {"broker": self.stack.kafka, "postgres": self.stack.postgres}
        return {name: server.pid for name, server in found.items() if server is not None and server.pid is not None}

    @contextlib.contextmanager
    def role(self, name: str, **more: str) -> Iterator[subprocess.Popen[str]]:
        """A process of its own, ended with the block."""
        command = [sys.executable, str(ROLES), name]
        with subprocess.Popen(command, env={**os.environ, **self.environment, **more}, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.terminate()
                process.wait(60)

    def finished(self, name: str) -> tuple[float, float]:
        """Runs a role to its end: (seconds that it measured itself, processor seconds of it, its start included, and the servers)."""
        before = cpu_seconds(self.servers) + _ended_children()
        with self.role(name) as process:
            assert process.stdout is not None
            told = float(process.stdout.readline())
            process.wait(60)
        return told, cpu_seconds(self.servers) + _ended_children() - before


def _ended_children() -> float:
    """Processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """Starts everything; leaves nothing behind."""
    stack = Stack(kafka_limits=KafkaLimits(heap_megabytes=1024, segment_bytes=2**28, retention_bytes=2**33), durable=True)
    stack.start()
    try:
        database, prefix = new_database(stack, ("memory",)), unique_kafka_prefix()
        made = Ground(stack, database, prefix)
        addresses = Addresses(stack.kafka_bootstrap_servers, stack.database_url, stack.redis_url)
        made.environment = {
            **common_environment(addresses, stack.folder, database.name),
            **{name: value for name, value in database.environment("memory").items() if "OWNER" not in name},
            "TESSERA__PROFILE": "test",
            "TESSERA__KAFKA__TOPIC_PREFIX": prefix,
            "TESSERA__KAFKA__KEYED_PARTITIONS": str(PARTITIONS),
            "TESSERA__KAFKA__BATCH_RECORDS": str(BATCH),
            "TESSERA__TELEMETRY__LOG_LEVEL": "WARNING",
            "TESSERA__TELEMETRY__LOG_FILE": str(stack.folder / "service.log"),
            "TESSERA__TELEMETRY__TRACING": "false",
            "TESSERA_MEMORY__ADMIN_PORT": "0",
            "BENCH_BOOTSTRAP": stack.kafka_bootstrap_servers,
            "BENCH_DATABASE_URL": database.admin_url,
            "BENCH_TOPIC": f"{prefix}ingest",
            "BENCH_REPLY_TOPIC": f"{prefix}reply",
            "BENCH_PARTITIONS": str(PARTITIONS),
            "BENCH_EVENTS": str(EVENTS),
            "BENCH_BATCH": str(BATCH),
        }
        subprocess.run(
            [sys.executable, "-m", "tessera.bus.make_topics"], check=True, env={**os.environ, **made.environment}, stdout=sys.stderr
        )
        for statement in _DDL:
            made.sql(statement)
        yield made
    finally:
        stack.stop()


class Load:
    """CloudEvents of about 250 bytes by librdkafka, as a stranger writes them."""

    def __init__(self, at: Ground) -> None:
        self._topic = f"{at.prefix}ingest"
        self._producer = confluent_kafka.Producer(
            {"bootstrap.servers": at.stack.kafka_bootstrap_servers, "linger.ms": 1, "queue.buffering.max.messages": 1_000_000}
        )
        self._numbers = itertools.count()

    def send(self) -> str:
        """Hands one event over; its id."""
        number = next(self._numbers)
        event_id = f"{uuid.uuid4().hex[:8]}-{number}"
        data = {"conversation_id": f"c-{number % 997}", "role": "user", "content": f"Event number {number}: {'the lamp is lit ' * 6}"}
        headers = {
            "ce_specversion": "1.0",
            "ce_id": event_id,
            "ce_source": "/bench",
            "ce_type": "tessera.message.published.v1",
            "ce_tenantid": "bench",
            "ce_time": datetime.now(UTC).isoformat(),
            "content-type": "application/json",
        }
        self._producer.produce(self._topic, json.dumps(data), key=data["conversation_id"], headers=list(headers.items()))
        return event_id

    def flush(self) -> None:
        """Waits for every acknowledgement."""
        assert self._producer.flush(60) == 0

    def many(self, count: int) -> None:
        """Sends as fast as it goes."""
        for number in range(count):
            self.send()
            if number % 50_000 == 0:
                self._producer.poll(0)
        self.flush()

    def steadily(self, rate: float, seconds: float, sent: Callable[[str, float], None], stopping: threading.Event | None = None) -> int:
        """Open loop: each event has its moment, whatever happens to the others. `sent(id, moment it was due)`."""
        started, count = time.monotonic(), int(rate * seconds)
        for number in range(count):
            due = started + number / rate
            if stopping is not None and stopping.is_set():
                return number
            if (wait := due - time.monotonic()) > 0:
                self._producer.poll(0)
                time.sleep(wait)
            sent(self.send(), due)
        self.flush()
        return count


# --- throughput -----------------------------------------------------------------------------------


def applied(at: Ground) -> int:
    """Events of the topic ingest below the stored positions."""
    return int(at.sql("SELECT coalesce(sum(next_offset), 0) AS total FROM memory.consumer_position WHERE topic = 'ingest'")[0]["total"])


def hold_relay(at: Ground) -> None:
    """Takes the lease, so that publishing is measured by itself."""
    lease = "INSERT INTO memory.relay_lease (name, holder, epoch, expires_at) VALUES ('outbox', 'bench', 1, now() + interval '1 hour')"
    at.sql(lease)


def release_relay(at: Ground) -> None:
    """Lets the service publish."""
    at.sql("DELETE FROM memory.relay_lease")


def _still_runs(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"the service ended with {process.returncode}")


def throughput(at: Ground) -> dict[str, Any]:
    """Applies EVENTS that wait in the log, then publishes what they left in the outbox."""
    hold_relay(at)
    with at.role("service") as process:
        pids = (*at.servers, process.pid)
        first = eventually_blocking(lambda: applied(at) or _still_runs(process), _SETTLED)
        with Stopwatch(pids) as applying:
            eventually_blocking(lambda: applied(at) >= EVENTS, _SETTLED)
        handled = EVENTS - first
        progress(f"bus: {handled / applying.wall:.0f} events/s, {applying.cpu / handled * 1000:.3f} CPU-s per 1,000")
        waiting, oldest = at.sql("SELECT count(*), min(id) FROM memory.outbox")[0]
        release_relay(at)
        # The relay looks for the lease once a second: that wait is no part of how fast it publishes.
        eventually_blocking(lambda: not at.sql("SELECT 1 FROM memory.outbox WHERE id = $1", oldest), _SETTLED)
        waiting_then = int(at.sql("SELECT count(*) AS rows FROM memory.outbox")[0]["rows"])
        with Stopwatch(pids) as publishing:
            eventually_blocking(lambda: not at.sql("SELECT 1 FROM memory.outbox LIMIT 1"), _SETTLED)
        progress(f"relay: {waiting_then / publishing.wall:.0f} rows/s")
    stored = at.sql("SELECT count(*) AS rows, count(DISTINCT event_id) AS events FROM memory.bench_effect")[0]
    assert (stored["rows"], stored["events"], waiting) == (EVENTS, EVENTS, EVENTS), (dict(stored), waiting)
    return {
        "events_s": round(handled / applying.wall),
        "events_per_core_s": round(handled / applying.cpu),
        "relay_rows_s": round(waiting_then / publishing.wall),
        "relay_cpu_s_per_1000": round(publishing.cpu / waiting_then * 1000, 4),
    }


def floors(at: Ground) -> dict[str, Any]:
    """The same rows by COPY; the same records without an effect."""
    at.sql("TRUNCATE memory.inbox, memory.bench_effect, memory.outbox")
    copied, copy_cpu = at.finished("copy")
    progress(f"COPY: {EVENTS / copied:.0f} events/s")
    at.sql("TRUNCATE memory.inbox, memory.bench_effect, memory.outbox")
    consumed, _ = at.finished("consume")
    progress(f"aiokafka: {EVENTS / consumed:.0f} events/s")
    return {
        "copy_events_s": round(EVENTS / copied),
        "copy_events_per_core_s": round(EVENTS / copy_cpu),
        "aiokafka_events_s": round(EVENTS / consumed),
    }


# --- latency --------------------------------------------------------------------------------------


class Told:
    """When each effect was committed, by NOTIFY, in a thread of its own."""

    def __init__(self, at: Ground) -> None:
        self.moments: dict[str, float] = {}
        self._url = at.database.admin_url
        self._listening = threading.Event()
        self._stopped: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=lambda: uvloop.run(self._listen()))

    def __enter__(self) -> dict[str, float]:
        self._thread.start()
        self._listening.wait(30)
        return self.moments

    def __exit__(self, *_: object) -> None:
        self._stopped()
        self._thread.join(30)

    async def _listen(self) -> None:
        connection = await asyncpg.connect(self._url)

        def told(_: object, __: int, ___: str, payload: object) -> None:
            now = time.monotonic()
            self.moments.update(dict.fromkeys(str(payload).split(","), now))

        await connection.add_listener("bench", told)
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        self._stopped = lambda: loop.call_soon_threadsafe(stopping.set)
        self._listening.set()
        await stopping.wait()
        await connection.close()


def effect_latency(at: Ground, load: Load, role: str) -> tuple[list[float], dict[str, float]]:
    """Seconds from the moment an event was due to its committed effect, at RATE events/s; cores that each process kept busy meanwhile."""
    due: dict[str, float] = {}
    with at.role(role) as process, Told(at) as moments:
        if role == "effect":
            assert process.stdout is not None
            process.stdout.readline()
        else:
            load.send()
            load.flush()
            eventually_blocking(lambda: bool(moments), _SETTLED)
        load.steadily(RATE, 3, lambda *_: None)
        pids = {"python": process.pid, **at.servers_by_name}
        watches = {name: Stopwatch((pid,)) for name, pid in pids.items()}
        with contextlib.ExitStack() as watching:
            for watch in watches.values():
                watching.enter_context(watch)
            load.steadily(RATE, LATENCY_SECONDS, due.__setitem__)
        eventually_blocking(lambda: due.keys() <= moments.keys(), _SETTLED)
        busy = {name: round(watch.cpu / watch.wall, 2) for name, watch in watches.items()}
        return [moments[event_id] - moment for event_id, moment in due.items()], busy


async def _ask(at: Ground) -> list[float]:
    servers = {"bootstrap_servers": at.stack.kafka_bootstrap_servers, "topic_prefix": at.prefix}
    settings = AskerSettings.model_validate({"profile": "test", "kafka": servers, "postgres": at.database.settings("memory").model_dump()})
    bus = Bus(settings, None, on_fatal=lambda error: progress(f"fatal: {error}"))
    requests = bus.requests
    await bus.connect()
    await bus.start()
    taken = []
    try:
        for number in range(REQUESTS + 100):
            started = time.perf_counter()
            asked = RecallRequested(reply_partition=requests.reply_partition, query="q", limit=1, filter=RecallFilter())
            await requests.ask(asked, tenant_id="bench", request_id=None, timeout=timedelta(seconds=10))
            if number >= 100:
                taken.append(time.perf_counter() - started)
            await asyncio.sleep(0.005)
    finally:
        await bus.drain()
        await bus.stop()
    return taken


class AskerSettings(ServiceSettings, service="gateway"):
    """Asks as the gateway does."""


def request_reply(at: Ground) -> list[float]:
    """Seconds from asking to the answer, one at a time."""
    with at.role("service"):
        return uvloop.run(_ask(at))


async def _hops(at: Ground, out: str, back: str) -> list[float]:
    bootstrap = at.stack.kafka_bootstrap_servers
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="latest", fetch_max_wait_ms=50)
    await producer.start()
    await consumer.start()
    consumer.assign([TopicPartition(back, 0)])
    await consumer.seek_to_end()
    await consumer.position(TopicPartition(back, 0))
    taken = []
    for number in range(REQUESTS + 100):
        started = time.perf_counter()
        await producer.send_and_wait(out, b'{"n": 1}', partition=0)
        while not await consumer.getmany(timeout_ms=5000):
            pass
        if number >= 100:
            taken.append(time.perf_counter() - started)
        await asyncio.sleep(0.005)
    await consumer.stop()
    await producer.stop()
    return taken


def two_hops(at: Ground) -> list[float]:
    """The floor of request and reply: out to a process that echoes, and back."""
    with at.role("echo") as process:
        assert process.stdout is not None
        process.stdout.readline()
        return uvloop.run(_hops(at, f"{at.prefix}ingest", f"{at.prefix}reply"))


def one_hop(at: Ground) -> list[float]:
    """One raw hop within this process."""
    return uvloop.run(_hops(at, f"{at.prefix}reply", f"{at.prefix}reply"))


async def _commits(at: Ground) -> list[float]:
    connection = await asyncpg.connect(at.database.admin_url)
    taken = []
    for number in range(REQUESTS + 100):
        started = time.perf_counter()
        async with connection.transaction():
            await connection.execute("INSERT INTO memory.bench_effect (tenant_id, event_id) VALUES ('bench', $1)", str(number))
        if number >= 100:
            taken.append(time.perf_counter() - started)
        await asyncio.sleep(0.005)
    await connection.close()
    return taken


def one_commit(at: Ground) -> list[float]:
    """One transaction of one row."""
    return uvloop.run(_commits(at))


def effects(at: Ground) -> dict[str, Any]:
    """Ours beside the floor."""
    for statement in _NOTIFYING:
        at.sql(statement)
    load = Load(at)
    (ours, busy), (floor, floor_busy) = effect_latency(at, load, "service"), effect_latency(at, load, "effect")
    told = [milliseconds(values, share) for values in (ours, floor) for share in (0.5, 0.99)]
    progress(f"effect p50, p99 in ms: {told[:2]}; floor {told[2:]}")
    at.sql("DROP TRIGGER bench_told ON memory.bench_effect")
    return {
        "effect_p50_ms": told[0],
        "effect_p99_ms": told[1],
        "effect_floor_p50_ms": told[2],
        "effect_floor_p99_ms": told[3],
        "effect_cores": busy,
        "effect_floor_cores": floor_busy,
        "effect_p99_vs_floor": round(told[1] / told[3], 2),
    }


def latencies(at: Ground) -> dict[str, Any]:
    """Ours beside the floors."""
    found = effects(at)
    asked, hops, hop, commit = request_reply(at), two_hops(at), one_hop(at), one_commit(at)
    progress(f"request and reply p50 {milliseconds(asked, 0.5)} ms, p99 {milliseconds(asked, 0.99)}; two hops {milliseconds(hops, 0.5)}")
    distance = milliseconds(hops, 0.5) / (2 * milliseconds(hop, 0.5))
    effect_distance = found["effect_floor_p50_ms"] / (milliseconds(hop, 0.5) + milliseconds(commit, 0.5))
    return {
        **found,
        "request_reply_p50_ms": milliseconds(asked, 0.5),
        "request_reply_p99_ms": milliseconds(asked, 0.99),
        "request_reply_floor_p50_ms": milliseconds(hops, 0.5),
        "request_reply_floor_p99_ms": milliseconds(hops, 0.99),
        "request_reply_p50_vs_floor": round(milliseconds(asked, 0.5) / milliseconds(hops, 0.5), 2),
        "request_reply_p99_vs_floor": round(milliseconds(asked, 0.99) / milliseconds(hops, 0.99), 2),
        "hop_p50_ms": milliseconds(hop, 0.5),
        "commit_p50_ms": milliseconds(commit, 0.5),
        "request_reply_floor_vs_hops": round(distance, 2),
        "effect_floor_vs_hop_and_commit": round(effect_distance, 2),
        "valid": max(distance, effect_distance) <= _FARTHEST,
    }


# --- catching up ----------------------------------------------------------------------------------


def catch_up(at: Ground, events_s: int) -> dict[str, Any]:
    """How much faster than they arrive events are applied after a stop of STOPPED_SECONDS, at a tenth of the measured throughput."""
    rate, stopping, load = events_s / 10, threading.Event(), Load(at)
    arriving = threading.Thread(target=load.steadily, args=(rate, 3600, lambda *_: None, stopping))
    before = applied(at)
    arriving.start()
    try:
        time.sleep(STOPPED_SECONDS)
        with at.role("service"):
            first = eventually_blocking(lambda: applied(at) if applied(at) > before else None, _SETTLED)
            started = time.monotonic()
            eventually_blocking(lambda: applied(at) >= before + rate * (STOPPED_SECONDS + time.monotonic() - started), _SETTLED)
            caught, seconds = applied(at) - first, time.monotonic() - started
    finally:
        stopping.set()
        arriving.join()
    progress(f"catching up: {caught / seconds:.0f} events/s against {rate:.0f} arriving")
    return {"catch_up_ratio": round(caught / seconds / rate, 1), "catch_up_s": round(seconds, 1)}


def main() -> None:
    """The whole run, or with `effect` only how long an effect takes."""
    load_before = machine()
    if sys.argv[1:] == ["effect"]:
        with ground() as at:
            print_figures({**effects(at), "machine": load_before})
        return
    with ground() as at:
        progress(f"publishing {EVENTS} events")
        Load(at).many(EVENTS)
        figures = {**throughput(at), **floors(at)}
        figures["effect_vs_copy"] = round(figures["events_s"] / figures["copy_events_s"], 2)
        figures |= latencies(at)
        figures |= catch_up(at, figures["events_s"])
    print_figures({**figures, "events": EVENTS, "batch": BATCH, "machine": load_before})


if __name__ == "__main__":
    main()
