"""Runs worlds and prints every seed that shows something; exit code 1 then.

`make simulate SEEDS=20000` from a place chosen by chance; `SIMULATION_SEED=17` runs that one seed and tells its story.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import secrets
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    # Sets of strings have an order of their own in every process; here it must be the same in all.
    os.execve(sys.executable, [sys.executable, "-W", "ignore", "-m", "simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})

import structlog
from simulation.planted import BUGS, Bug
from simulation.world import Verdict, simulate

_COLLECT_EVERY = 20
_ALL = "all"


@dataclass(slots=True)
class _Tally:
    """Of all worlds so far."""

    seeds: int = 0
    found: int = 0
    steps: int = 0
    virtual_seconds: float = 0.0

    def add(self, verdict: Verdict) -> None:
        """One more world."""
        self.seeds += 1
        self.found += not verdict.clean
        self.steps += verdict.steps
        self.virtual_seconds += verdict.virtual_seconds


def main() -> int:
    """The command line."""
    given = _arguments()
    _prepare()
    if given.planted == _ALL:
        return _find_all(given)
    return _run(given, BUGS[given.planted] if given.planted else nullcontext)


def _find_all(given: argparse.Namespace) -> int:
    """Every planted bug in turn, each until it is found; says which were. They share what it costs to begin."""
    missed = 0
    for name, bug in BUGS.items():
        found = _run(given, bug)
        missed += not found
        print(f"{'found' if found else 'missed'}: {name}", flush=True)
    return 1 if missed < len(BUGS) else 0


def _run(given: argparse.Namespace, bug: Bug) -> int:
    tally, began = _Tally(), time.process_time()
    for seed in range(given.first, given.first + given.seeds):
        verdict = simulate(seed, bug)
        tally.add(verdict)
        if given.trace:
            print(f"{verdict}\n{verdict.story}")
        elif not verdict.clean:
            print(verdict, flush=True)
        if given.stop and not verdict.clean:
            break
        if seed % _COLLECT_EVERY == 0:
            gc.collect()
    print(
        f"{tally.seeds} seeds from {given.first}: {tally.found} with findings; {tally.steps} steps, {tally.virtual_seconds:.0f} virtual s, "
        f"{time.process_time() - began:.1f} CPU-s",
        file=sys.stderr,
    )
    return 1 if tally.found else 0


def _arguments() -> argparse.Namespace:
    only = os.environ.get("SIMULATION_SEED")
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1 if only else 1_000)
    parser.add_argument("--first", type=int, default=int(only) if only else None, help="chosen by chance where absent")
    parser.add_argument("--planted", choices=(*BUGS, _ALL), help="with this bug in the code")
    parser.add_argument("--stop", action="store_true", help="at the first finding")
    parser.add_argument("--trace", action="store_true", default=bool(only), help="tell what happened in each world")
    given = parser.parse_args()
    if given.first is None:
        given.first = secrets.randbelow(10**9)
    return given


def _prepare() -> None:
    """What the bus logs is of no use here and costs more than the rest; killed tasks are dropped without a word."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=True)
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    gc.collect()
    gc.freeze()  # what is imported need not be looked at again and again
    gc.disable()


if __name__ == "__main__":
    sys.exit(main())
