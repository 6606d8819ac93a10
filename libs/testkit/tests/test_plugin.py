"""What the plugin promises of a run by several workers, seen from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.testkit.plugin import ports_of_worker

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


_GROUPED = """
import os, pathlib, pytest
pytestmark = pytest.mark.xdist_group("grouped")

@pytest.mark.parametrize("number", range(3))
def test_one(number):
    with (pathlib.Path(__file__).parent / "seen.txt").open("a") as seen:
        seen.write(f"grouped {os.getpid()}\\n")
"""
_ENDING = """
import pathlib, pytest
from tessera.testkit.plugin import until_last_use

pytest_plugins = ["tessera.testkit.plugin"]
LOG = pathlib.Path(__file__).parent / "log.txt"

def note(what):
    with LOG.open("a") as log:
        log.write(what + "\\n")

@pytest.fixture(scope="session")
def server():
    until_last_use("server", lambda: note("stopped"))
    note("started")
    yield note

@pytest.fixture
def plain():
    return note
"""
_USING = """
import pytest
pytestmark = pytest.mark.xdist_group("server")

@pytest.mark.parametrize("number", range(3))
def test_one(number, server):
    server("used")
"""
_NOT_USING = """
def test_one(plain):
    plain("not used")
"""


def test_what_files_share_ends_with_the_last_test_that_uses_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(_ENDING)
    for number in range(3):
        (tmp_path / f"test_using{number}.py").write_text(_USING)
        (tmp_path / f"test_not_using{number}.py").write_text(_NOT_USING)
    done = _pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "log.txt").read_text().splitlines()
    begin = said.index("started")
    assert said[begin : begin + 11] == ["started", *["used"] * 9, "stopped"]
    assert sorted(said[:begin] + said[begin + 11 :]) == ["not used"] * 3


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(folder)]
    apart = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SLIPCOVER"))}  # not this run's workers
    return subprocess.run(command, cwd=folder, env=apart, capture_output=True, text=True, check=False, timeout=50)


def test_a_file_stays_on_one_worker_and_so_do_all_that_share_the_platform_or_name_a_group(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    for number in range(3):
        (tmp_path / f"test_alone{number}.py").write_text(_FILE.format(argument="", group=f"alone{number}"))
        (tmp_path / f"test_shared{number}.py").write_text(_FILE.format(argument=", platform", group="shared"))
        (tmp_path / f"test_grouped{number}.py").write_text(_GROUPED)
    done = _pytest(tmp_path, "-n", "2", "--dist", "loadgroup")
    assert done.returncode == 0, done.stdout + done.stderr
    workers: dict[str, set[str]] = {}
    for group, worker in (line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()):
        workers.setdefault(group, set()).add(worker)
    assert {group: len(pids) for group, pids in workers.items()} == {"alone0": 1, "alone1": 1, "alone2": 1, "shared": 1, "grouped": 1}
    assert len(set.union(*workers.values())) == 2


def test_no_two_workers_choose_the_same_port() -> None:
    parts = [set(ports_of_worker(number, 3)) for number in range(3)]
    assert set.union(*parts) == set(ports_of_worker(0, 1))
    assert sum(map(len, parts)) == len(ports_of_worker(0, 1))
