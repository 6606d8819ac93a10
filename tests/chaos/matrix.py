"""The fault matrix as data: what is broken, where, how long recovery may take, and what else must hold."""

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos import injecting as do
from chaos.killing import Reaper, deck
from chaos.load import Rates
from chaos.world import Scene, World

from tessera.testkit.fault_proxy import Weather
from tessera.testkit.history import ANOMALIES, Findings

Inject = Callable[[World, Scene, random.Random], None]
_AFTER_SECONDS = 2.0
_KILLS_PER_ROUND = 10
_KILL_RATES = Rates(posts=3.0, chats=2.0, jobs=2.0)
"""Every crash point is reached within seconds."""


@dataclass(frozen=True)
class Row:
    """One fault."""

    name: str
    number: int
    """In the list of faults that the design names."""
    fault: str
    condition: str
    """What must hold beside the oracle."""
    inject: Inject
    bound_seconds: float = 90.0
    """Longest time from the end of the fault until all is quiet and complete."""
    needs: tuple[str, ...] = ()
    """What the machine must be able to do: see `missing`."""
    rates: Rates = field(default_factory=Rates)
    cluster: bool = False
    """Played on a platform of its own with three brokers."""


@dataclass
class Result:
    """What came of one row."""

    name: str
    events: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    recovery_seconds: float = 0.0
    lasted_seconds: float = 0.0
    kills: dict[str, Counter[str]] = field(default_factory=dict)
    unavailable: int = 0

    def add(self, findings: Findings) -> None:
        """Count the anomalies of one scene."""
        self.findings.update(findings.counts())
        if not findings.clean:
            self.lines.append(str(findings))

    @property
    def clean(self) -> bool:
        """Whether everything held."""
        return not any(self.findings.values())


KILL = "kill"
_SLOW = Weather(latency_seconds=0.1)
_TRICKLE = Weather(bytes_per_second=100_000)
ROWS: tuple[Row, ...] = (
    Row("rolling", 2, "SIGTERM to every replica in turn, two gateways", "no answer of 500 or above", do.rolling),
    Row("broker_killed", 3, "SIGKILL of the broker, twice", "services rejoin without a restart", do.broker_killed),
    Row("broker_stopped", 3, "clean stop and start of the broker", "services rejoin without a restart", do.broker_stopped),
    Row("broker_frozen", 4, "SIGSTOP of the broker for 60 s", "no consumer stays stuck", do.broker_frozen, 120.0),
    Row(
        "postgres_killed", 5, "SIGKILL of Postgres inside a transaction, and at any time", "pools recover by themselves", do.postgres_killed
    ),
    Row(
        "postgres_read_only",
        6,
        "every transaction is read-only for 10 s",
        "a write is answered 503 with Retry-After",
        do.postgres_read_only,
    ),
    Row(
        "postgres_exhausted",
        6,
        "all connections taken and the services' own ended, for 8 s",
        "pools recover by themselves",
        do.postgres_exhausted,
    ),
    Row("redis_lost", 7, "SIGKILL of Redis, back after 8 s and empty", "chats are answered meanwhile", do.redis_lost),
    Row("redis_flushed", 7, "FLUSHALL ten times", "-", do.redis_flushed),
    Row("redis_frozen", 7, "SIGSTOP of Redis for 12 s", "chats are answered meanwhile", do.redis_frozen),
    Row("kafka_cut", 8, "packets to and from Kafka dropped", "-", do.cut("kafka", to_server=True, to_client=True), 120.0, ("packets",)),
    Row("kafka_cut_one_way", 8, "packets from Kafka dropped", "-", do.cut("kafka", to_server=False, to_client=True), 120.0, ("packets",)),
    Row(
        "postgres_cut",
        8,
        "packets to and from Postgres dropped",
        "-",
        do.cut("postgres", to_server=True, to_client=True),
        120.0,
        ("packets",),
    ),
    Row(
        "postgres_cut_one_way",
        8,
        "packets from Postgres dropped",
        "-",
        do.cut("postgres", to_server=False, to_client=True),
        120.0,
        ("packets",),
    ),
    Row("slow", 9, "100 ms more each way to Kafka, Postgres and Redis", "-", do.weather(15, kafka=_SLOW, postgres=_SLOW, redis=_SLOW)),
    Row("trickle", 9, "100 kB/s per connection to Kafka and Postgres", "-", do.weather(15, kafka=_TRICKLE, postgres=_TRICKLE)),
    Row("slow_closes", 9, "connections whose end is told 5 s late", "-", do.slow_closes),
    Row("resets", 9, "connections reset in the middle of an answer", "-", do.resets),
    Row(
        "broker_disk_full",
        10,
        "no room where the broker keeps its log",
        "no acknowledgement of what is lost",
        do.disk_full("kafka"),
        120.0,
        ("disks",),
    ),
    Row("postgres_disk_full", 10, "no room where Postgres keeps its data", "-", do.disk_full("postgres"), 120.0, ("disks",)),
    Row("poison_crash", 11, "an event that crashes the process", "dead letter; neighbours are applied", do.poison("crash")),
    Row("poison_hang", 11, "an event whose handler never ends", "dead letter; neighbours are applied", do.poison("hang")),
    Row("poison_memory", 11, "an event whose handler takes all memory", "dead letter; neighbours are applied", do.poison("memory")),
    Row("malformed", 12, "no JSON, wrong fields, unknown type and version, oversize", "dead letters with reasons", do.malformed),
    Row("repeated", 13, "half of the events ten times, late again, out of order", "one effect", do.nothing(20), rates=Rates(repeated=0.5)),
    Row("clock_skewed", 14, "memory and generator an hour ahead, an hour behind, back", "-", do.clock_skewed, 90.0, ("faketime",)),
    Row("zombie", 15, "SIGSTOP of a replica beyond its session, then SIGCONT", "no write under its old assignment", do.zombie),
    Row("burst", 16, "ten times the rate for 10 s", "no service grows by 400 MiB", do.burst),
    Row(
        "provider",
        18,
        "a provider that refuses (429), stalls, breaks off",
        "no call after a reader has seen text; one end each",
        do.provider,
    ),
    Row("rebalances", 17, "replicas of retention 1 → 8 → 1", "-", do.rebalances),
    Row(
        "one_of_three_brokers",
        3,
        "SIGKILL of one of three brokers, back after 8 s",
        "events are accepted meanwhile",
        do.one_broker_lost,
        cluster=True,
    ),
)
NEVER = {
    "versions": "old and new version side by side: no version has been released yet that this one would have to run beside",
}
"""Rows that cannot be played anywhere yet, with the reason."""


def missing(row: Row, world_has: frozenset[str]) -> str | None:
    """Why a row cannot be played on this machine; None where it can."""
    reasons = {
        "packets": "no network namespace of its own with nftables (needs root, unshare and nft)",
        "disks": "no file system can be mounted (needs root)",
        "faketime": "libfaketime is not installed",
    }
    return next((reasons[need] for need in row.needs if need not in world_has), None)


def abilities(isolated: bool) -> frozenset[str]:
    """What this machine can do; `isolated` where this process has a network and mounts of its own."""
    found = {"disks"} if isolated else set()
    if isolated and shutil.which("nft") and subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=False).returncode == 0:
        found.add("packets")
    if Path(do.FAKETIME).exists():
        found.add("faketime")
    return frozenset(found)


def play(row: Row, world: World, randomness: random.Random) -> Result:
    """One row: load, fault, quiet, oracle. A breach of its condition counts as stuck."""
    result, began = Result(row.name), time.monotonic()
    with world.scene(row.name, row.rates) as scene:
        try:
            row.inject(world, scene, randomness)
        except AssertionError as breach:
            result.add(Findings(stuck=[f"condition: {breach}"]))
        _measure(result, world, scene, row.bound_seconds)
    result.lasted_seconds = time.monotonic() - began
    return result


def play_kills(world: World, randomness: random.Random, kills: int, bound_seconds: float = 120.0) -> Result:
    """Every service again and again, all at the same time, in rounds; the oracle after each."""
    result, began = Result(KILL), time.monotonic()
    decks = {service: deck(service, kills, randomness) for service in world.services}
    for first in range(0, kills, _KILLS_PER_ROUND):
        dealt = {name: deaths[first : first + _KILLS_PER_ROUND] for name, deaths in decks.items()}
        with world.scene(KILL, _KILL_RATES) as scene:
            for service, died in _killed(world, randomness, dealt):
                result.kills.setdefault(service, Counter()).update(died)
            _measure(result, world, scene, bound_seconds)
        print(
            f"  {min(kills, first + _KILLS_PER_ROUND)} kills of each: {dict(result.findings)}; {'; '.join(result.lines)}",
            file=sys.stderr,
            flush=True,
        )
    result.lasted_seconds = time.monotonic() - began
    return result


def _killed(world: World, randomness: random.Random, decks: dict[str, list[str]]) -> list[tuple[str, Counter[str]]]:
    reapers = [Reaper(world.platform, service, deaths, random.Random(randomness.random())) for service, deaths in decks.items()]
    for reaper in reapers:
        reaper.start()
    for reaper in reapers:
        reaper.join()
    return [(reaper.service, reaper.died) for reaper in reapers]


def _measure(result: Result, world: World, scene: Scene, bound_seconds: float) -> None:
    """Recovery counts from the end of the fault; the load goes on for a little of it."""
    healed = time.monotonic()
    time.sleep(_AFTER_SECONDS)
    result.add(scene.settle(bound_seconds))
    result.recovery_seconds = max(result.recovery_seconds, time.monotonic() - healed)
    result.events += scene.load.ledger.records
    result.unavailable += scene.load.ledger.unavailable


def total(results: list[Result]) -> Counter[str]:
    """The anomalies of all rows."""
    counted: Counter[str] = Counter(dict.fromkeys(ANOMALIES, 0))
    for result in results:
        counted.update(result.findings)
    return counted
