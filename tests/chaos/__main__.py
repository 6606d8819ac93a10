"""`make chaos`: every fault of the matrix on a real platform under load. Progress on stderr, one JSON line last on stdout.

make chaos                                         everything, at least 100 kills of every service
make chaos ARGS="--rows kill,zombie --kills 10"    some of it
CHAOS_SEED=… make chaos                            a run again
"""

import argparse
import json
import logging
import os
import random
import secrets
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chaos.matrix import KILL, NEVER, ROWS, Result, abilities, missing, play, play_kills, total
from chaos.report import write
from chaos.world import World

from tessera.testkit.history import Findings

_ISOLATED = "CHAOS_ISOLATED"


def main() -> None:
    """Exits with 1 where anything was found."""
    options = _options()
    _isolate()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # whether a dead broker answers is asked again and again
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(2**31))
    can = abilities(os.environ.get(_ISOLATED) == "1")
    _say(f"seed {seed}; this machine can: {', '.join(sorted(can)) or 'nothing special'}")
    results, skipped = _run(options, seed, can)
    found = total(results)
    kills = [sum(died.values()) for result in results for died in result.kills.values()]
    figures = {
        "faults": len(results),
        "not_injected": skipped,
        "kills_per_service": min(kills, default=0),
        "events": sum(result.events for result in results),
        "lost": found["lost"],
        "doubled": found["doubled"],
        "reordered": found["reordered"],
        "stuck": found["stuck"] + found["aborted"],
        "longest_recovery_s": round(max((result.recovery_seconds for result in results), default=0.0), 1),
        "seed": seed,
    }
    if options.rows is None:
        write(results, skipped, figures)
    print(json.dumps(figures))
    sys.exit(0 if all(result.clean for result in results) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(","), help=f"of {KILL}, {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--kills", type=int, default=100, help="of every service")
    options = parser.parse_args()
    unknown = set(options.rows or ()) - {KILL, *(row.name for row in ROWS)}
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}")
    return options


def _isolate() -> None:
    """A network and mounts of its own, where that is allowed: packets can be dropped, and nothing mounted is left behind."""
    if _ISOLATED in os.environ:
        if os.environ[_ISOLATED] == "1":
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
    allowed = subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0
    command = [*(unshare if allowed else []), sys.executable, "-m", "chaos", *sys.argv[1:]]
    os.environ[_ISOLATED] = "1" if allowed else "0"
    os.execvp(command[0], command)


def _run(options: argparse.Namespace, seed: int, can: frozenset[str]) -> tuple[list[Result], dict[str, str]]:
    chosen = [row for row in ROWS if options.rows is None or row.name in options.rows]
    skipped = dict(NEVER) | {row.name: reason for row in chosen if (reason := missing(row, can))}
    plays: list[tuple[str, Callable[[World], Result]]] = []
    if options.rows is None or KILL in options.rows:
        plays.append((KILL, lambda world: play_kills(world, random.Random(f"{seed}:{KILL}"), options.kills)))
    plays += [(row.name, partial(play, row, randomness=random.Random(f"{seed}:{row.name}"))) for row in chosen if row.name not in skipped]
    clustered = {row.name for row in ROWS if row.cluster}
    results: list[Result] = []
    world: World | None = None
    try:
        for name, run in plays:
            if world is not None and world.cluster != (name in clustered):
                world.stop()
                world = None
            world = world or _world(seed, can, cluster=name in clustered)
            results.append(_played(name, run, world))
            _say(_line(results[-1]))
            if not results[-1].clean:
                _keep(world, name)
                world.stop()
                world = None
    finally:
        if world is not None:
            world.stop()
    return results, skipped


def _world(seed: int, can: frozenset[str], *, cluster: bool) -> World:
    _say("starting a platform")
    made = World(seed, disks="disks" in can, cluster=cluster)
    made.start()
    return made


def _played(name: str, run: Callable[[World], Result], world: World) -> Result:
    """A row that breaks the test itself is a finding like any other: nothing is known about what it should have shown."""
    try:
        return run(world)
    except Exception:  # noqa: BLE001 - the other rows are played all the same
        result = Result(name)
        result.add(Findings(stuck=[traceback.format_exc()]))
        return result


def _keep(world: World, name: str) -> None:
    """Logs of a row that failed, for whoever looks into it."""
    folder = os.environ.get("CHAOS_LOGS")
    if folder:
        kept = Path(folder) / f"{name}-{int(time.time())}"
        kept.mkdir(parents=True)
        subprocess.run(["cp", "-r", str(world.platform.home / "logs"), str(kept)], check=False)


def _line(result: Result) -> str:
    verdict = "holds" if result.clean else "BROKEN\n" + "\n".join(result.lines)
    kills = "".join(f"\n    {service}: {dict(died)}" for service, died in result.kills.items())
    return (
        f"{result.name}: {result.events} events, recovered in {result.recovery_seconds:.1f} s, {result.unavailable} answers of 5xx, "
        f"took {result.lasted_seconds:.0f} s: {verdict}{kills}"
    )


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
