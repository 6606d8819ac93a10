"""supervisord on small programs: its configuration, its life, and what is left when it is killed."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tessera.local.errors import LocalError
from tessera.local.ports import free_port
from tessera.local.processes import Command, recorded, spawn, wait_until
from tessera.local.supervision import SERVERS, SERVICES, Program, Supervisor

WAITING = (sys.executable, "-c", "import threading; threading.Event().wait()")
# A folder whose name holds what supervisord's configuration treats as special.
AWKWARD = 'a folder; with 50%s of "it"'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / AWKWARD
    for name in (SERVERS, SERVICES):
        (folder / "run" / name).mkdir(parents=True)
    return folder


@pytest.fixture
def supervisor(home: Path) -> Iterator[Supervisor]:
    made = Supervisor(home, free_port(), "password", 1_000_000)
    yield made
    made.shutdown()


def _program(home: Path, name: str, group: str, program: tuple[str, ...] = WAITING) -> Program:
    return Program(name, group, Command(program, home, signal.SIGTERM, record=home / "run" / group / f"{name}.json"))


def _wait(supervisor: Supervisor, name: str, state: str) -> None:
    wait_until(lambda: supervisor.states()[name]["statename"] == state, time.monotonic() + 30, f"{name} was not {state}")


def _process(home: Path, name: str, group: str = SERVERS) -> psutil.Process:
    """The program; supervisord may say that it runs before it has written down who it is."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found.extend(process for process in [recorded(home / "run" / group / f"{name}.json")] if process is not None)
        return bool(found)

    wait_until(there, time.monotonic() + 30, f"{name} was not recorded")
    return found[0]


def _is_gone(process: psutil.Process) -> bool:
    """Whether it does nothing any more; how soon the machine's first process reaps an orphan is not ours."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_servers_start_at_once_and_services_when_asked(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS), _program(home, "memory", SERVICES)])
    _wait(supervisor, "kafka", "RUNNING")
    assert supervisor.states()["memory"]["statename"] == "STOPPED"
    supervisor.ensure_started(["kafka", "memory"])
    _wait(supervisor, "memory", "RUNNING")
    supervisor.stop_programs(["memory"])
    assert supervisor.states()["memory"]["pid"] == 0


def test_a_killed_program_is_started_again(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS)])
    _wait(supervisor, "kafka", "RUNNING")
    before = _process(home, "kafka")
    before.kill()
    wait_until(lambda: supervisor.states()["kafka"]["pid"] not in (0, before.pid), time.monotonic() + 30, "kafka did not come back")


def test_the_same_programs_leave_it_running_and_others_restart_it(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS)])
    first = recorded(supervisor.record)
    supervisor.start([_program(home, "kafka", SERVERS)])
    assert recorded(supervisor.record) == first
    supervisor.start([_program(home, "kafka", SERVERS), _program(home, "redis", SERVERS)])
    assert recorded(supervisor.record) != first
    assert set(supervisor.states()) == {"kafka", "redis"}


def test_shutdown_ends_everything(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS)])
    _wait(supervisor, "kafka", "RUNNING")
    processes = [_process(home, "kafka"), *filter(None, [recorded(supervisor.record)])]
    supervisor.shutdown()
    assert not supervisor.is_running()
    assert psutil.wait_procs(processes, 5)[1] == []
    assert supervisor.states() == {}


def test_after_supervisord_is_killed_nothing_of_it_is_left_and_it_starts_again(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS)])
    _wait(supervisor, "kafka", "RUNNING")
    child, parent = _process(home, "kafka"), recorded(supervisor.record)
    assert parent is not None
    parent.kill()
    parent.wait(5)
    assert not supervisor.is_running()
    supervisor.end_orphans()
    assert _is_gone(child)
    supervisor.start([_program(home, "kafka", SERVERS)])
    _wait(supervisor, "kafka", "RUNNING")


def test_orphans_of_a_system_without_death_signals_are_ended(supervisor: Supervisor, home: Path) -> None:
    command = Command(WAITING, home, signal.SIGTERM, record=home / "run" / SERVICES / "memory.json", outlives=True)
    spawn(command, home / "memory.log")
    wait_until(lambda: recorded(home / "run" / SERVICES / "memory.json") is not None, time.monotonic() + 20, "no record")
    child = _process(home, "memory", SERVICES)
    supervisor.end_orphans()
    assert _is_gone(child)


def test_a_program_that_ends_at_once_does_not_run_and_its_output_is_kept(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS, (sys.executable, "-c", "raise SystemExit('no disk')"))])
    wait_until(lambda: "no disk" in (home / "logs" / "kafka.log").read_text(), time.monotonic() + 30, "no output")
    ended = ("BACKOFF", "FATAL", "EXITED")
    wait_until(lambda: supervisor.states()["kafka"]["statename"] in ended, time.monotonic() + 30, "it seems to run")


def test_asking_for_an_unknown_program_is_an_error(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS)])
    with pytest.raises(LocalError, match="BAD_NAME"):
        supervisor._ask("startProcess", "servers:nobody", False)


def test_without_supervisord_an_order_says_that_it_does_not_answer(supervisor: Supervisor) -> None:
    with pytest.raises(LocalError, match="does not answer"):
        supervisor._ask("shutdown")


def test_the_configuration_is_for_the_owner_alone(supervisor: Supervisor, home: Path) -> None:
    supervisor.start([_program(home, "kafka", SERVERS)])
    assert supervisor.configuration.stat().st_mode & 0o077 == 0
