"""Thousands of worlds show nothing; the same seed is the same world; and what is planted is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.planted import BUGS

pytestmark = [pytest.mark.unit, pytest.mark.timeout(600)]

SEEDS = 2_000
WITHIN = 1_000
"""Seeds within which each planted bug must be found; without it, none of them shows anything."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Apart from this process: its clocks are replaced, and measuring lines would triple the time."""
    measuring = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "COVERAGE_FILE", "SIMULATION_SEED")
    environment = {name: value for name, value in os.environ.items() if name not in measuring}
    environment |= {"PYTHONHASHSEED": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-m", "simulation", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_no_world_shows_an_anomaly() -> None:
    only = os.environ.get("SIMULATION_SEED")
    worlds = ("--first", only, "--seeds", "1", "--trace") if only else ("--first", "0", "--seeds", str(SEEDS))
    done = run(*worlds)
    print(done.stderr)
    assert done.returncode == 0, f"{done.stdout[-6_000:]}\n{done.stderr[-2_000:]}\nRepeat one with SIMULATION_SEED=…"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    done = run("--first", "0", "--seeds", str(WITHIN), "--stop", "--planted", bug)
    assert done.returncode == 1, f"not found: {done.stderr[-2_000:]}"
    assert done.stdout.startswith("seed "), done.stderr[-2_000:]


def test_the_same_seed_is_the_same_world_wherever_it_runs() -> None:
    first = run("--first", "40", "--seeds", "6", "--trace").stdout
    assert first.count("steps") == 6
    assert run("--first", "40", "--seeds", "6", "--trace").stdout == first
    assert first.endswith(run("--first", "45", "--seeds", "1", "--trace").stdout), "what ran before makes a difference"
