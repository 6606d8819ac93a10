"""Our own OpenAPI document holds: Schemathesis tries every operation of it on the running platform, as a client of another kind.

It runs as its own program, because its phases (examples, coverage, fuzzing, stateful) and its configuration (openapi.toml) belong to the
program. What a fixed seed tries is the same each time; the examples and the coverage do not depend on the seed and are not repeated.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.testkit.platform import Platform

# A platform on another worker than the one that all share: they would take longer than everything else together.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("openapi")]

HERE = Path(__file__).parent
RANDOM = random.SystemRandom().randrange(2**32)
"""pytest-randomly would make it the same in every run."""


@pytest.mark.parametrize(
    ("seed", "phases"), [(2026, "examples,coverage,fuzzing,stateful"), (RANDOM, "fuzzing,stateful")], ids=["fixed", "random"]
)
def test_every_operation_does_what_the_document_says(platform: Platform, seed: int, phases: str) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(HERE / "openapi.toml"), "--no-color", "run"]
    command += [f"{platform.url}/openapi.json", "--checks", "all", "--max-examples", "50", "--phases", phases, "--seed", str(seed)]
    command += ["--header", f"Authorization: Bearer {platform.admin_key}"]
    operators_key = platform.admin_key.split("_")[2]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "openapi_hooks", "SPARED_KEY": operators_key}
    done = subprocess.run(command, env=environment, cwd=platform.home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
    assert _operations(platform) == _tested(done.stdout), done.stdout


def _operations(platform: Platform) -> int:
    document = platform.request("GET", "/openapi.json").json()
    return sum(len(operations) for operations in document["paths"].values())


def _tested(summary: str) -> int:
    """How many operations were tried: none may be left out."""
    return int(next(line for line in summary.splitlines() if line.strip().startswith("Tested:")).split(":")[1])
