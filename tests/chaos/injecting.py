"""How each fault is brought about, and ended. Every function returns once the fault is over."""

import asyncio
import contextlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import asyncpg
import httpx
import psutil
from chaos.load import message
from chaos.observing import MESSAGE, headers, rows
from chaos.world import PATIENCE_SECONDS, Scene, World
from confluent_kafka import Producer

from tessera.local.folders import CHECKOUT
from tessera.local.processes import Command
from tessera.testkit import ServiceProcess, eventually_blocking
from tessera.testkit.breakable import SESSION_SECONDS, ClusterStack
from tessera.testkit.fault_proxy import FAIR, Weather
from tessera.testkit.platform import Platform

FREEZE_SECONDS = 60.0
_AWAY_SECONDS = 8.0
_REPLICAS = 8
_CHATS = 24
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
_BURST_SECONDS = 10.0
_GROWTH_BYTES = 400 * 1024 * 1024
"""Most that one service may grow by in a burst."""


# --- services -------------------------------------------------------------------------------------
def rolling(world: World, scene: Scene, randomness: random.Random) -> None:
    """SIGTERM to one replica after the other, in a random order; of the gateway there are two."""
    first = world.platform.processes["gateway"]
    with replica(world, "gateway", TESSERA_GATEWAY__PORT=str(first.http_port)) as second:
        services = [name for name in world.services if name != "gateway"]
        randomness.shuffle(services)
        before = scene.load.ledger.unavailable
        for process in (first, second, *(world.platform.processes[service] for service in services)):
            process.stop()
            process.start()
            process.wait_ready()
        assert scene.load.ledger.unavailable == before, f"answers: {dict(scene.load.ledger.answers)}"


def zombie(world: World, scene: Scene, randomness: random.Random) -> None:
    """A replica that has partitions is stopped in mid-work for longer than its session, then goes on."""
    for service in ("memory", "retention"):
        stopped = world.platform.processes[service]
        with replica(world, service):
            _partitions_shared(world, service)
            _signal(stopped, signal.SIGSTOP)
            try:
                time.sleep(SESSION_SECONDS + randomness.uniform(2, 6))
            finally:
                _signal(stopped, signal.SIGCONT)
            time.sleep(1)


def rebalances(world: World, scene: Scene, randomness: random.Random) -> None:
    """Replicas of one service come and go: 1, 8, 1."""
    with contextlib.ExitStack() as more:
        for _ in range(_REPLICAS - 1):
            more.enter_context(replica(world, "retention", wait=False))
            time.sleep(randomness.uniform(0.1, 1))


@contextmanager
def replica(world: World, service: str, *, wait: bool = True, **overrides: str) -> Iterator[ServiceProcess]:
    """A further process of a service."""
    process = world.platform._process(service)
    process.override(**overrides)
    process.start()
    try:
        if wait:
            process.wait_ready()
        yield process
    finally:
        process.stop()


def _partitions_shared(world: World, service: str) -> None:
    """Both replicas are known to have taken up work."""

    def look() -> bool:
        found = world.platform.request("GET", "/v1/status").json()["services"]
        replicas = [replica for each in found if each["service"] == service for replica in each["replicas"]]
        return sum(any(consumer["partitions"] for consumer in replica["consumers"]) for replica in replicas) >= 2

    with contextlib.suppress(AssertionError):
        eventually_blocking(look, 10)


def _signal(process: ServiceProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


# --- Kafka ----------------------------------------------------------------------------------------
def broker_killed(world: World, scene: Scene, randomness: random.Random) -> None:
    """SIGKILL, twice."""
    for _ in range(2):
        world.server("kafka").kill()
        time.sleep(randomness.uniform(0, 3))
        world.heal(())
        time.sleep(randomness.uniform(0, 3))


def broker_stopped(world: World, scene: Scene, randomness: random.Random) -> None:
    """A clean stop and a start."""
    world.server("kafka").stop()
    time.sleep(randomness.uniform(0, 3))
    world.heal(())


def broker_frozen(world: World, scene: Scene, randomness: random.Random) -> None:
    """SIGSTOP for a minute."""
    with frozen(world.server("kafka").pid):
        time.sleep(FREEZE_SECONDS)


def one_broker_lost(world: World, scene: Scene, randomness: random.Random) -> None:
    """SIGKILL of one of three; the others go on."""
    assert isinstance(world.stack, ClusterStack)
    lost = randomness.choice(world.stack.brokers)
    lost.kill()
    time.sleep(_AWAY_SECONDS / 2)
    acknowledged = len(scene.load.ledger.acknowledged)
    time.sleep(_AWAY_SECONDS / 2)
    assert len(scene.load.ledger.acknowledged) > acknowledged, "nothing was acknowledged without one of three brokers"
    world.heal(())


@contextmanager
def frozen(pid: int | None) -> Iterator[None]:
    """Inside, the process does nothing and its connections stay open; with all its children."""
    everyone = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in everyone:
        process.suspend()
    try:
        yield
    finally:
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


# --- Postgres -------------------------------------------------------------------------------------
def postgres_killed(world: World, scene: Scene, randomness: random.Random) -> None:
    """SIGKILL while a transaction of memory stands in the middle, then at any time."""
    with table_held(world.platform, "memory.memory"):
        eventually_blocking(lambda: waiting_for_lock(world.platform), PATIENCE_SECONDS)
        world.server("postgres").kill()
    world.heal(())
    time.sleep(randomness.uniform(1, 4))
    world.server("postgres").kill()
    world.heal(())


def postgres_read_only(world: World, scene: Scene, randomness: random.Random) -> None:
    """As after a failover to a standby: every transaction is read-only. Who asks for a write is told when to come again."""
    _administer(world, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    try:
        time.sleep(2)
        answer = world.platform.request("POST", "/v1/tenants", json={"id": f"{scene.tenant}-more"})
        told = (answer.status_code, "retry-after" in answer.headers)
        time.sleep(_AWAY_SECONDS)
    finally:
        writing = "SET default_transaction_read_only = off"
        _administer(world, writing, "ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
    assert told == (503, True), f"a write was answered {told}: {answer.text[:300]}"


def postgres_exhausted(world: World, scene: Scene, randomness: random.Random) -> None:
    """Every connection is somebody else's, and the services' own are ended."""

    async def hold() -> None:
        held: list[asyncpg.Connection] = []
        until = time.monotonic() + _AWAY_SECONDS
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE 'tessera%'"
        try:
            while time.monotonic() < until:
                try:
                    held.append(await asyncpg.connect(world.platform.database.admin_url))
                except (asyncpg.TooManyConnectionsError, OSError):
                    await held[0].execute(end)
                    await asyncio.sleep(0.2)
        finally:
            await asyncio.gather(*(connection.close() for connection in held))

    _apart(hold())


@contextmanager
def table_held(platform: Platform, table: str) -> Iterator[None]:
    """Keeps every transaction that writes to the table waiting in the middle."""
    held, release = threading.Event(), threading.Event()

    async def hold() -> None:
        connection = await asyncpg.connect(platform.database.admin_url)
        try:
            await connection.execute("BEGIN")
            await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            held.set()
            await asyncio.to_thread(release.wait, PATIENCE_SECONDS)
        finally:
            connection.terminate()  # no COMMIT, which would fail where the server is dead: the end of the connection gives the lock back

    holding = threading.Thread(target=lambda: asyncio.run(hold()))
    holding.start()
    try:
        assert held.wait(PATIENCE_SECONDS)
        yield
    finally:
        release.set()
        holding.join(PATIENCE_SECONDS)


def waiting_for_lock(platform: Platform) -> bool:
    """Whether a transaction of memory stands in the middle."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = $1 AND datname = current_database()"
    return bool(rows(platform, waiting, "tessera_memory_worker"))


def _administer(world: World, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(world.platform.database.admin_url)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    _apart(run())


def _apart(work: object) -> None:
    worker = threading.Thread(target=lambda: asyncio.run(work))  # type: ignore[arg-type]
    worker.start()
    worker.join()


# --- Redis ----------------------------------------------------------------------------------------
def redis_lost(world: World, scene: Scene, randomness: random.Random) -> None:
    """Dead for a while, then empty."""
    world.server("redis").kill()
    answered = len(scene.load.ledger.chats)
    time.sleep(_AWAY_SECONDS)
    assert len(scene.load.ledger.chats) > answered, "no chat was answered without Redis"
    world.heal(())


def redis_flushed(world: World, scene: Scene, randomness: random.Random) -> None:
    """FLUSHALL, again and again."""
    from redis import Redis  # noqa: PLC0415

    client = Redis.from_url(world.stack.redis_url)
    for _ in range(10):
        client.flushall()
        time.sleep(randomness.uniform(0.1, 0.8))
    client.close()


def redis_frozen(world: World, scene: Scene, randomness: random.Random) -> None:
    """Accepts connections and says nothing."""
    answered = len(scene.load.ledger.chats)
    with frozen(world.server("redis").pid):
        time.sleep(_AWAY_SECONDS * 1.5)
        assert len(scene.load.ledger.chats) > answered, "no chat was answered while Redis hung"


# --- network --------------------------------------------------------------------------------------
def cut(server: str, *, to_server: bool, to_client: bool) -> Callable[[World, Scene, random.Random], None]:
    """Packets between everybody and one server are dropped by the kernel, one way or both."""

    def inject(world: World, scene: Scene, randomness: random.Random) -> None:
        port = world.stack.proxies[server].port
        rules = [f"tcp dport {port} drop"] if to_server else []
        rules += [f"tcp sport {port} drop"] if to_client else []
        with _dropping(rules):
            time.sleep(randomness.uniform(_AWAY_SECONDS, 2 * _AWAY_SECONDS))

    return inject


@contextmanager
def _dropping(rules: list[str]) -> Iterator[None]:
    def nft(*words: str) -> None:
        subprocess.run(["nft", *words], check=True)

    nft("add table inet chaos")
    try:
        nft("add chain inet chaos output { type filter hook output priority 0 ; }")
        for rule in rules:
            nft(f"add rule inet chaos output {rule}")
        yield
    finally:
        nft("delete table inet chaos")


def weather(seconds: float, **by_server: Weather) -> Callable[[World, Scene, random.Random], None]:
    """What a proxy does to every connection of its server."""

    def inject(world: World, scene: Scene, randomness: random.Random) -> None:
        for server, what in by_server.items():
            world.stack.proxies[server].turn(what)
        try:
            time.sleep(seconds)
        finally:
            for server in by_server:
                world.stack.proxies[server].turn(FAIR)

    return inject


def resets(world: World, scene: Scene, randomness: random.Random) -> None:
    """Connections are reset in the middle of an answer, and all at once."""
    servers = ("kafka", "postgres", "redis")
    for _ in range(6):
        for server in servers:
            world.stack.proxies[server].reset_all()
            world.stack.proxies[server].turn(Weather(resets_after_bytes=randomness.randint(2_000, 60_000)))
        time.sleep(randomness.uniform(1, 3))
    for server in servers:
        world.stack.proxies[server].turn(FAIR)


def slow_closes(world: World, scene: Scene, randomness: random.Random) -> None:
    """The servers end every connection; their clients hear of it seconds later."""
    for proxy in world.stack.proxies.values():
        proxy.turn(Weather(closes_after_seconds=5))
    _administer(world, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE 'tessera%'")
    world.server("kafka").stop()
    world.heal(())
    time.sleep(5)
    for proxy in world.stack.proxies.values():
        proxy.turn(FAIR)


# --- disks ----------------------------------------------------------------------------------------
def disk_full(server: str) -> Callable[[World, Scene, random.Random], None]:
    """No room left where the server keeps its data; afterwards there is, and what died of it is started again."""

    def inject(world: World, scene: Scene, randomness: random.Random) -> None:
        with world.stack.disk_full(server):
            time.sleep(2 * _AWAY_SECONDS)
        time.sleep(1)
        world.heal(())

    return inject


# --- events ---------------------------------------------------------------------------------------
class PoisonedProcess(ServiceProcess):
    """memory, in whose handler an event with the poison in it does what the poison says (`chaos.poisoned`)."""

    def command(self) -> Command:
        usual = super().command()
        return Command(
            program=(usual.program[0], "-m", "chaos.poisoned"),
            cwd=usual.cwd,
            stop_signal=usual.stop_signal,
            environment=usual.environment,
        )


def poison(kind: str) -> Callable[[World, Scene, random.Random], None]:
    """Events that crash the process, never end, or take all memory; neighbours before, between and behind them."""

    def inject(world: World, scene: Scene, randomness: random.Random) -> None:
        usual = world.platform.processes["memory"]
        usual.stop()
        process = world.platform._process("memory")
        poisoned = PoisonedProcess("memory", world.stack, world.platform.database, world.platform.kafka_prefix, process._overrides)
        poisoned.override(PYTHONPATH=str(CHECKOUT / "tests"))
        world.platform.processes["memory"] = poisoned
        poisoned.start()
        try:
            scene.expected_dead = {f"poison-{kind}"}
            poisonous = {**message("poison-0", "c-1"), "content": f"POISON {kind}"}
            publish(world.platform, "ingest", scene.tenant, f"poison-{kind}", poisonous)
            _supervise_until(poisoned, lambda: _dead_letters(world, scene) >= 1)
        finally:
            poisoned.kill()
            world.platform.processes["memory"] = usual
            usual.start()
            usual.wait_ready()

    return inject


def _supervise_until(process: ServiceProcess, done: Callable[[], bool]) -> None:
    """Starts the process again whenever it has died, as a supervisor does."""

    def look() -> bool:
        if process.exit_code is not None:
            process.stop()
            process.start()
        return done()

    eventually_blocking(look, PATIENCE_SECONDS)


def _dead_letters(world: World, scene: Scene) -> int:
    answer = world.platform.request("GET", "/v1/dead-letters", params={"limit": 50})
    return sum(letter["tenant_id"] == scene.tenant for letter in answer.json().get("data", ()))


def malformed(world: World, scene: Scene, randomness: random.Random) -> None:
    """What a producer can get wrong; each goes to the dead letters with the reason, and its neighbours go on."""
    good = message("bad-0", "c-2")
    wrong: Mapping[str, tuple[bytes, str]] = {
        "bad-json": (b"{not json", MESSAGE),
        "bad-field": (json.dumps({**good, "role": "nobody"}).encode(), MESSAGE),
        "bad-missing": (json.dumps({"role": "user"}).encode(), MESSAGE),
        "bad-version": (json.dumps(good).encode(), "tessera.message.published.v9"),
        "bad-type": (json.dumps(good).encode(), "com.example.unheard.of"),
        "bad-size": (json.dumps({**good, "content": "x" * 950_000}).encode(), MESSAGE),
    }
    scene.expected_dead = set(wrong)
    for name, (value, kind) in wrong.items():
        publish(world.platform, "ingest", scene.tenant, name, value, kind=kind)
    eventually_blocking(lambda: _dead_letters(world, scene) >= len(wrong), PATIENCE_SECONDS)


def publish(platform: Platform, topic: str, tenant: str, name: str, value: object, *, kind: str = MESSAGE) -> None:
    """One record of a stranger's, acknowledged."""
    producer = Producer({"bootstrap.servers": platform.stack.kafka_bootstrap_servers, "message.max.bytes": 2_000_000, "log_level": 0})
    attributes = [(key, kind if key == "ce_type" else text) for key, text in headers(tenant, name)]
    body = value if isinstance(value, bytes) else json.dumps(value)
    producer.produce(f"{platform.kafka_prefix}{topic}", key="c-1", value=body, headers=attributes)
    assert producer.flush(PATIENCE_SECONDS) == 0


def nothing(seconds: float) -> Callable[[World, Scene, random.Random], None]:
    """The load itself is the fault."""

    def inject(world: World, scene: Scene, randomness: random.Random) -> None:
        time.sleep(seconds)

    return inject


def clock_skewed(world: World, scene: Scene, randomness: random.Random) -> None:
    """Two services live an hour ahead, then an hour behind, then jump back."""
    for skew in ("+1h", "-1h", ""):
        for service in ("memory", "generator"):
            process = world.platform.processes[service]
            process.stop()
            process.override(LD_PRELOAD=FAKETIME if skew else "", FAKETIME=skew, FAKETIME_DONT_FAKE_MONOTONIC="1", FAKETIME_NO_CACHE="1")
            process.start()
            process.wait_ready()
        time.sleep(3)


def burst(world: World, scene: Scene, randomness: random.Random) -> None:
    """Ten times the usual rate; no service may grow beyond a bound."""
    before = _memory(world)
    scene.load.hurry = 10.0
    peak = dict(before)
    until = time.monotonic() + _BURST_SECONDS
    while time.monotonic() < until:
        peak = {service: max(peak[service], size) for service, size in _memory(world).items()}
        time.sleep(0.5)
    scene.load.hurry = 1.0
    grown = {service: (peak[service] - before[service]) for service in before}
    assert max(grown.values()) < _GROWTH_BYTES, f"grown by MiB: { {name: size >> 20 for name, size in grown.items()} }"


def _memory(world: World) -> dict[str, int]:
    return {service: psutil.Process(process.pid).memory_info().rss for service, process in world.platform.processes.items() if process.pid}


# --- a provider -----------------------------------------------------------------------------------
def provider(world: World, scene: Scene, randomness: random.Random) -> None:
    """Chats with a model whose provider refuses, stalls, breaks off and answers by turns, while the generator is killed."""
    generator = world.platform.processes["generator"]
    with Upstream(randomness) as upstream:
        offered = {
            "name": "upstream",
            "base_url": upstream.url,
            "models": ["upstream/model"],
            "read_timeout_seconds": 1.5,
            "connect_timeout_seconds": 2,
        }
        _again(generator, TESSERA_GENERATOR__PROVIDERS=json.dumps([offered]))
        eventually_blocking(lambda: "upstream/model" in world.platform.request("GET", "/v1/models").text, PATIENCE_SECONDS)
        asking = [threading.Thread(target=_ask, args=(world, scene, number)) for number in range(_CHATS)]
        for number, thread in enumerate(asking):
            thread.start()
            time.sleep(randomness.uniform(0, 0.5))
            if number == _CHATS // 2:
                generator.kill()
                generator.start()
        for thread in asking:
            thread.join()
        told = {number: calls for number, calls in upstream.spoke.items() if number % 2 and calls > 1}
    _again(generator, TESSERA_GENERATOR__PROVIDERS="")
    assert not told, f"called again after a reader may have seen text: {told}"


def _again(process: ServiceProcess, **overrides: str) -> None:
    process.stop()
    process.override(**overrides)
    process.start()
    process.wait_ready()


def _ask(world: World, scene: Scene, number: int) -> None:
    """One chat, streamed where the number is odd, repeated until it has an answer or an end that was told."""
    body = {"model": "upstream/model", "messages": [{"role": "user", "content": f"number {number}"}], "stream": bool(number % 2)}
    for _ in range(20):
        with contextlib.suppress(httpx.HTTPError):
            answer = world.platform.request(
                "POST", "/v1/chat/completions", key=scene.key, json=body, headers={"Idempotency-Key": f"upstream-{number}"}, timeout=30
            )
            if answer.status_code < 500 or "generation_" in answer.text or "provider" in answer.text:
                return
        time.sleep(0.5)


def _left(connection: socket.socket) -> bool:
    """Whether the other side has closed its connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


class Upstream:
    """An OpenAI-compatible server on loopback that misbehaves by turns."""

    def __init__(self, randomness: random.Random) -> None:
        self.spoke: Counter[int] = Counter()
        """By the number in the question: calls in which text came to somebody who still listened."""
        self._randomness = randomness
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                upstream._answer(self)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Up to and including /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "Upstream":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        number = int(body["messages"][-1]["content"].split()[-1])
        mood = self._randomness.choice(("well", "well", "refuses", "stalls", "breaks"))
        if mood == "refuses":
            request.send_response(429)
            request.send_header("retry-after", "1")
            request.send_header("content-length", "2")
            request.end_headers()
            request.wfile.write(b"{}")
            return
        if mood == "stalls":
            time.sleep(3)
        with contextlib.suppress(OSError):
            self._speak(request, number, whole=mood != "breaks")

    def _speak(self, request: http.server.BaseHTTPRequestHandler, number: int, *, whole: bool) -> None:
        request.send_response(200)
        request.send_header("content-type", "text/event-stream")
        request.end_headers()
        for piece in range(5 if whole else 2):
            choice = {"index": 0, "delta": {"content": f"piece {piece} "}, "finish_reason": None}
            request.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            request.wfile.flush()
            time.sleep(0.1)
            if _left(request.connection):  # it lost patience while this stalled, or it was killed: nobody has read the piece
                return
            self.spoke[number] += piece == 0
        if whole:
            end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
            request.wfile.write(b"data: " + json.dumps(end).encode() + b"\n\ndata: [DONE]\n\n")
