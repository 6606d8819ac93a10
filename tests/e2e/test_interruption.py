"""Ctrl-C at any stage of `make test` leaves no process, no port, no folder and no change in git."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tessera.local.ports import is_free
from tessera.testkit import eventually_blocking

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
CHECKOUT = Path(__file__).parents[2]
_GIVEN = ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "REDIS_URL")


def _run(stage: str, scratch: Path, progress: Path) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name not in _GIVEN and not name.startswith("COV")}
    environment |= {"TMPDIR": str(scratch), "INTERRUPTED_STAGE": stage, "INTERRUPTED_PROGRESS": str(progress)}
    with (progress / "output").open("wb") as output:
        return subprocess.Popen(
            [str(CHECKOUT / ".ci" / "test"), "tests/e2e/interrupted/slow_steps.py", "-p", "no:randomly"],
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _processes_of(run: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


def _listening(processes: list[psutil.Process]) -> set[int]:
    return {found.laddr.port for process in processes for found in _connections(process) if found.status == psutil.CONN_LISTEN}


def _connections(process: psutil.Process) -> list[psutil._common.pconn]:
    try:
        return list(process.net_connections("inet"))
    except psutil.NoSuchProcess:
        return []


def _reached(stage: str, run: "subprocess.Popen[bytes]", progress: Path) -> bool:
    assert run.poll() is None, (progress / "output").read_text()
    if stage == "start":
        return any(process.name() == "java" for process in _processes_of(run))
    return (progress / stage).exists()


def _git_status() -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    for parent in (folder, *list(folder.parents)[:3]):
        parent.chmod(0o755)
    yield folder


@pytest.mark.parametrize("stage", ["start", "test", "teardown"])
def test_interrupting_leaves_nothing_behind(stage: str, scratch: Path, tmp_path: Path) -> None:
    before = _git_status()
    run = _run(stage, scratch, tmp_path)
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
    assert _git_status() == before
