"""A forked service process is one like any other: it runs, can be killed and ends with the test that started it."""

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from tessera.testkit.forking import ForkedProcess, ForkServer
from tessera.testkit.plugin import DatabaseFactory, ServiceFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack
from tessera.testkit.waiting import eventually_blocking

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def started(server: ForkServer, folder: Path) -> ForkedProcess:
    """A service that is told nothing, and therefore refuses to run."""
    return server.start("tokenizer", ["--cwd", str(folder), "--", "unused"], folder / "log")


def test_it_says_what_it_lacks_and_ends_as_a_started_one_does(server: ForkServer, tmp_path: Path) -> None:
    forked = started(server, tmp_path)
    assert (tmp_path / "log").exists()
    assert forked.wait(60) == forked.poll()
    program = "from tessera.tokenizer.app import main; main()"
    other = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert other.returncode == forked.returncode != 0
    assert "settings" in (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text() == other.stdout + other.stderr


def test_one_that_has_ended_can_be_told_anything(server: ForkServer, tmp_path: Path) -> None:
    forked = started(server, tmp_path)
    code = forked.wait(60)
    forked.kill()
    forked.send_signal(signal.SIGTERM)
    assert forked.wait() == code


def test_it_runs_alone_can_be_killed_and_started_again(postgres_database: DatabaseFactory, service_process: ServiceFactory) -> None:
    service = service_process("memory", database=postgres_database("memory"), kafka_prefix="forked-", wait=False)
    eventually_blocking(lambda: lives(service), timedelta(seconds=60))
    pid = service.pid
    assert pid is not None
    parent = psutil.Process(pid).parent()
    assert parent is not None
    assert parent.parent() == psutil.Process()
    service.kill()
    assert not psutil.pid_exists(pid)
    assert service.exit_code is None
    service.start()
    eventually_blocking(lambda: lives(service), timedelta(seconds=60))
    service.stop()
    assert service.pid is None


def test_it_ends_with_the_process_that_wanted_it(stack: Stack, postgres_database: DatabaseFactory, tmp_path: Path) -> None:
    service = ServiceProcess("tokenizer", stack, postgres_database("tokenizer"), "forked-", {})
    service.prepare()
    program = (
        "import json, sys, time; from pathlib import Path; from tessera.testkit.forking import ForkServer\n"
        "server = ForkServer(); child = server.start('tokenizer', json.loads(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(server._process.pid, child.pid, flush=True); time.sleep(100)"
    )
    arguments = [sys.executable, "-c", program, json.dumps(service.command().options()), str(tmp_path / "log")]
    wanting = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert wanting.stdout is not None
    left = [psutil.Process(int(pid)) for pid in wanting.stdout.readline().split()]
    assert len(left) == 2
    eventually_blocking(lambda: lives(service), timedelta(seconds=60))
    wanting.kill()
    wanting.communicate()
    eventually_blocking(lambda: not any(map(runs, left)), timedelta(seconds=30))


def lives(service: ServiceProcess) -> bool:
    try:
        return service.get_admin("/health/live")[0] == http.client.OK
    except OSError:
        return False


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
