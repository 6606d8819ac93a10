"""What happens in the world of a seed: its events, its settings, and what goes wrong when."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tessera.bus import faults

if TYPE_CHECKING:
    from simulation.world import World

_POINTS: Final = tuple(sorted(value for name, value in vars(faults).items() if name.isupper() and isinstance(value, str)))


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a producer outside."""

    id: str
    key: str
    at: float
    copies: int
    content: str
    """What its handler does: `ok`, `slow 0.3`, `invalid`, `retry 5` and `bug 1` (so often, then well), `bug 999` (always), `kill`."""

    @property
    def is_refusable(self) -> bool:
        """Whether a dead letter is an answer to it."""
        return self.content in ("invalid", "bug 999", "kill")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong at a time, for a time."""

    at: float
    kind: str
    seconds: float
    share: float

    async def strike(self, world: World) -> None:
        """Returns when it is over."""
        await asyncio.sleep(self.at)
        world.note(f"{self.kind} for {self.seconds:.2f} s")
        await _FAULTS[self.kind](world, self)
        world.note(f"{self.kind} is over")


@dataclass(frozen=True, slots=True)
class Plan:
    """The world of a seed."""

    seed: int
    answering: bool
    """Requests instead of ingestion."""
    shuffled: bool
    partitions: int
    replicas: int
    gaps: float
    events: Sequence[Event]
    faults: Sequence[Fault]
    crashes: frozenset[tuple[str, int]]
    """(point, how often it was reached before the process dies there)."""
    reads: int = 0
    """How often a client looks whether a write is visible."""
    batched: bool = False
    """Whether the handler takes neighbours together."""
    storage_latency: float = 0.004
    """Seconds of a round trip to Postgres, at most."""
    kafka: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int) -> Plan:
        """The same for the same seed, on every machine."""
        chance = random.Random(f"plan {seed}")
        calm, crowded = chance.random() < 0.1, chance.random() < 0.25
        return cls(
            seed=seed,
            answering=seed % 4 == 3,
            shuffled=chance.random() < 0.5,
            partitions=4 if crowded else chance.choice((1, 2, 2, 3)),
            replicas=chance.choice((1, 2, 2, 3)),
            gaps=chance.choice((0.0, 0.0, 0.2)),
            events=_crowd(chance) if crowded else _events(chance),
            faults=() if calm else _faults(chance, crowded=crowded),
            crashes=frozenset((chance.choice(_POINTS), chance.randint(1, 4)) for _ in range(0 if calm else chance.choice((0, 0, 1, 2)))),
            reads=chance.choice((0, 2, 4)),
            batched=chance.random() < 0.5,
            storage_latency=0.03 if crowded else 0.004,
            kafka={
                "batch_records": 8 if crowded else chance.choice((1, 2, 3, 5)),
                "heartbeat_milliseconds": 1_000,
                "commit_milliseconds": 1_000,
            },
        )


def _events(chance: random.Random) -> tuple[Event, ...]:
    keys = [f"k{number}" for number in range(chance.randint(1, 4))]
    span = chance.choice((0.0, 1.0, 5.0))
    return tuple(
        Event(f"e{number}", chance.choice(keys), chance.random() * span, chance.choice((1, 1, 1, 2)), _content(chance))
        for number in range(chance.randint(3, 12))
    )


def _crowd(chance: random.Random) -> tuple[Event, ...]:
    """Little at a time on each of several partitions, faster than one transaction follows the other: they share them."""
    return tuple(
        Event(f"e{number}", f"k{chance.randrange(8)}", chance.random() * 1.5, chance.choice((1, 1, 1, 2)), _content(chance, ok=0.93))
        for number in range(24)
    )


def _content(chance: random.Random, *, ok: float = 0.75) -> str:
    if chance.random() < ok:
        return "ok"
    return chance.choice((f"slow {chance.random():.2f}", "invalid", "retry 1", "retry 5", "bug 1", "bug 999", "slow 3"))


def _faults(chance: random.Random, *, crowded: bool) -> tuple[Fault, ...]:
    """Where partitions share transactions a zombie is what matters most: it comes back with several of them in hand."""
    zombie = (Fault(chance.random() * 2.0, "freeze", 20.0, 0.5),) if crowded else ()
    return (*zombie, *(_fault(chance) for _ in range(chance.randint(1, 4 - len(zombie)))))


def _fault(chance: random.Random) -> Fault:
    return Fault(chance.random() * 4.0, chance.choice(tuple(_FAULTS)), chance.choice((0.2, 1.0, 4.0, 10.0)), chance.choice((0.2, 0.5)))


# --- faults ---------------------------------------------------------------------------------------------------------------------------
async def _kill(world: World, fault: Fault) -> None:
    """One replica dies, another one takes its place after a while."""
    if victims := world.alive():
        world.chance.choice(victims).kill()
    await asyncio.sleep(fault.seconds)
    world.start_replica()


async def _freeze(world: World, fault: Fault) -> None:
    """A zombie: it does nothing for a while and then goes on."""
    victims = [replica for replica in world.alive() if not replica.process.frozen]
    if not victims:
        return
    victim = world.chance.choice(victims).process
    world.loop.freeze(victim)
    await asyncio.sleep(fault.seconds)
    world.loop.thaw(victim)


async def _storage_away(world: World, fault: Fault) -> None:
    world.outages += 1  # a hand-over meanwhile leaves a mark behind (docs/delivery.md, known limits)
    world.server.stop()
    await asyncio.sleep(fault.seconds)
    world.server.start()


async def _storage_in_doubt(world: World, fault: Fault) -> None:
    world.server.loses_answers = fault.share
    await asyncio.sleep(fault.seconds)
    world.server.loses_answers = 0.0


async def _storage_slow(world: World, fault: Fault) -> None:
    world.server.slowness = 0.5
    await asyncio.sleep(fault.seconds)
    world.server.slowness = world.plan.storage_latency


async def _broker_away(world: World, fault: Fault) -> None:
    world.cluster.reachable = False
    await asyncio.sleep(fault.seconds)
    world.cluster.reachable = True


async def _no_leader(world: World, fault: Fault) -> None:
    world.cluster.led = False
    await asyncio.sleep(fault.seconds * 2)
    world.cluster.led = True


async def _acknowledgements_lost(world: World, fault: Fault) -> None:
    world.cluster.loses_acknowledgements = fault.share
    await asyncio.sleep(fault.seconds)
    world.cluster.loses_acknowledgements = 0.0


async def _records_refused(world: World, fault: Fault) -> None:
    world.cluster.refuses_records = fault.share
    await asyncio.sleep(fault.seconds)
    world.cluster.refuses_records = 0.0


async def _commits_fail(world: World, fault: Fault) -> None:
    world.cluster.fails_commits = fault.share
    await asyncio.sleep(fault.seconds)
    world.cluster.fails_commits = 0.0


async def _broker_slow(world: World, fault: Fault) -> None:
    world.cluster.slowness = 0.5
    await asyncio.sleep(fault.seconds)
    world.cluster.slowness = 0.004


async def _join(world: World, fault: Fault) -> None:
    """One more replica, which leaves again in order."""
    await asyncio.sleep(0)
    replica = world.start_replica()
    await asyncio.sleep(fault.seconds)
    if replica.process.alive and not replica.process.frozen and len(world.alive()) > 1:
        await replica.stop() if fault.share > 0.3 else None


async def _leave(world: World, fault: Fault) -> None:
    """A rolling restart of one replica: SIGTERM, then a new one."""
    candidates = [replica for replica in world.alive() if not replica.process.frozen]
    if candidates:
        leaving = asyncio.create_task(world.chance.choice(candidates).stop())
        await asyncio.wait({leaving}, timeout=60)
    world.start_replica()


_FAULTS: Final[dict[str, Callable[[World, Fault], Awaitable[None]]]] = {
    "kill": _kill,
    "freeze": _freeze,
    "storage away": _storage_away,
    "storage in doubt": _storage_in_doubt,
    "storage slow": _storage_slow,
    "broker away": _broker_away,
    "no leader": _no_leader,
    "acknowledgements lost": _acknowledgements_lost,
    "records refused": _records_refused,
    "commits fail": _commits_fail,
    "broker slow": _broker_slow,
    "join": _join,
    "leave": _leave,
}
