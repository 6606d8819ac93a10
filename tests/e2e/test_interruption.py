"""Ctrl-C at any stage of `make test` leaves no process, no port, no folder and no change in git.

The run is that of a clone, so that whoever edits the checkout meanwhile changes nothing here.
"""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tessera.local.folders import ENVIRONMENT, home
from tessera.local.ports import is_free
from tessera.testkit import eventually_blocking

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
CHECKOUT = Path(__file__).parents[2]
_GIVEN = ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "REDIS_URL")


def _run(stage: str, clone: Path, scratch: Path, progress: Path) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name not in _GIVEN and not name.startswith("SLIPCOVER")}
    environment |= {"TESSERA_HOME": str(home()), "TMPDIR": str(scratch), "INTERRUPTED_STAGE": stage, "INTERRUPTED_PROGRESS": str(progress)}
    with (progress / "output").open("wb") as output:
        return subprocess.Popen(
            [str(clone / ".ci" / "test"), "tests/e2e/interrupted/slow_steps.py", "-p", "no:randomly"],
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _processes_of(run: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


def _listening(processes: list[psutil.Process]) -> set[int]:
    return {port for process in processes for port in _ports(process)}


def _ports(process: psutil.Process) -> list[int]:
    try:
        return [found.laddr.port for found in process.net_connections("inet") if found.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def _reached(stage: str, run: "subprocess.Popen[bytes]", progress: Path) -> bool:
    assert run.poll() is None, (progress / "output").read_text()
    if stage == "start":
        return any(process.name() == "java" for process in _processes_of(run))
    return (progress / stage).exists()


def _git_status(clone: Path) -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    for parent in (folder, *list(folder.parents)[:3]):
        parent.chmod(0o755)
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(CHECKOUT), str(folder)], check=True)
    (folder / ".tessera").mkdir()
    (folder / ".tessera" / "venv").symlink_to(ENVIRONMENT)
    return folder


@pytest.mark.parametrize("stage", ["start", "test", "teardown"])
def test_interrupting_leaves_nothing_behind(stage: str, clone: Path, scratch: Path, tmp_path: Path) -> None:
    before = _git_status(clone)
    run = _run(stage, clone, scratch, tmp_path)
    eventually_blocking(lambda: _reached(stage, run, tmp_path), 90)
    processes = _processes_of(run)
    ports = _listening(processes)
    assert processes
    assert ports or stage == "start"

    os.killpg(run.pid, signal.SIGINT)
    code = run.wait(60)

    output = (tmp_path / "output").read_text()
    assert code == 130, output
    assert "nobody interrupted" not in output
    _, alive = psutil.wait_procs(processes, 5)
    assert not alive
    assert [port for port in ports if not is_free(port)] == []
    assert list(scratch.iterdir()) == [], output
    assert _git_status(clone) == before
