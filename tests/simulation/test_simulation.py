"""Thousands of worlds show nothing; the same seed is the same world; and what is planted is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.planted import BUGS

pytestmark = [pytest.mark.unit, pytest.mark.timeout(600)]

SEEDS = 2_000
"""With the rest of this file, what `make test` may cost (docs/simulation.md); `make simulate` looks at others."""
WITHIN = 1_000
"""Seeds within which each planted bug must be found; without it, none of them shows anything."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Apart from this process: its clocks are replaced."""
    environment = {name: value for name, value in os.environ.items() if name != "SIMULATION_SEED"}
    environment |= {"PYTHONHASHSEED": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-m", "simulation", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_no_world_shows_an_anomaly() -> None:
    only = os.environ.get("SIMULATION_SEED")
    worlds = ("--first", only, "--seeds", "1", "--trace") if only else ("--first", "0", "--seeds", str(SEEDS))
    done = run(*worlds)
    print(done.stderr)
    assert done.returncode == 0, f"{done.stdout[-6_000:]}\n{done.stderr[-2_000:]}\nRepeat one with SIMULATION_SEED=…"


@pytest.fixture(scope="module")
def hunted() -> subprocess.CompletedProcess[str]:
    """All of them by one process: to import everything takes longer than to find one."""
    return run("--first", "0", "--seeds", str(WITHIN), "--stop", "--planted", "all")


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, hunted: subprocess.CompletedProcess[str]) -> None:
    assert f"found: {bug}" in hunted.stdout.splitlines(), f"{hunted.stdout[-2_000:]}\n{hunted.stderr[-2_000:]}"


def test_the_same_seed_is_the_same_world_wherever_it_runs() -> None:
    first = run("--first", "40", "--seeds", "6", "--trace").stdout
    assert first.count("steps") == 6
    again = run("--first", "42", "--seeds", "4", "--trace").stdout
    assert again.count("steps") == 4
    assert first.endswith(again), "another process, or what ran before, makes a difference"
