"""What the plugin promises of a run by several workers, seen from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

_FILE = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(6))
def test_one(number{argument}):
    with (pathlib.Path(__file__).parent / "seen.txt").open("a") as seen:
        seen.write(f"{group} {{os.getpid()}}\\n")
"""
_CONFTEST = """
import pytest
pytest_plugins = ["tessera.testkit.plugin"]

@pytest.fixture(scope="session")
def platform():
    return None
"""


def test_a_file_stays_on_one_worker_and_so_do_all_that_share_the_platform(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    for number in range(3):
        (tmp_path / f"test_alone{number}.py").write_text(_FILE.format(argument="", group=f"alone{number}"))
        (tmp_path / f"test_shared{number}.py").write_text(_FILE.format(argument=", platform", group="shared"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup", str(tmp_path)]
    apart = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SLIPCOVER"))}  # not this run's workers
    done = subprocess.run(command, cwd=tmp_path, env=apart, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    workers: dict[str, set[str]] = {}
    for group, worker in (line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()):
        workers.setdefault(group, set()).add(worker)
    assert {group: len(pids) for group, pids in workers.items()} == {"alone0": 1, "alone1": 1, "alone2": 1, "shared": 1}
    assert len(set.union(*workers.values())) == 2
