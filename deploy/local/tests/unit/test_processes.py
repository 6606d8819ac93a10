"""The life of a server as a child process, on a server of a few lines."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from tessera.local.errors import LocalError, NotReadyError
from tessera.local.ports import LOOPBACK, accepts_connections, free_port
from tessera.local.processes import Command, Server, end, last_lines, run_apart, uninterrupted, wait_until

LISTENING = """
import http.server, sys
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.BaseHTTPRequestHandler).serve_forever()
"""
STUBBORN = """
import pathlib, signal, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[2]).touch()
threading.Event().wait()
"""
ENDING_ONCE = f"""
import pathlib, sys
first = pathlib.Path(sys.argv[2] + ".first")
if not first.exists():
    first.touch()
    sys.exit(1)
{LISTENING}
"""


class Little(Server):
    name: ClassVar[str] = "little"
    grace_seconds: float = 0.3
    starts_allowed: int = 2

    def __init__(self, folder: Path, program: str) -> None:
        super().__init__(folder, free_port())
        self._program = program
        self.marker = folder / "marker"

    def prepare(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def command(self) -> Command:
        program = (sys.executable, "-c", self._program, str(self.port), str(self.marker))
        return Command(program, self.folder, signal.SIGTERM, lock=self.folder / "lock")

    def answers(self) -> bool:
        return self.marker.exists() or accepts_connections(f"{LOOPBACK}:{self.port}")


def test_it_starts_answers_and_stops(tmp_path: Path) -> None:
    server = Little(tmp_path, LISTENING)
    server.start()
    server.wait_ready(20)
    assert server.pid
    server.stop()
    assert not server.answers()


def test_a_live_server_is_not_started_again(tmp_path: Path) -> None:
    server = Little(tmp_path, LISTENING)
    server.start()
    with pytest.raises(LocalError, match="already running"):
        server.start()
    server.stop()


def test_a_killed_server_starts_again(tmp_path: Path) -> None:
    server = Little(tmp_path, LISTENING)
    server.start()
    server.wait_ready(20)
    server.kill()
    assert server.pid is None
    server.start()
    server.wait_ready(20)
    server.stop()


def test_a_server_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    server = Little(tmp_path, STUBBORN)
    server.start()
    server.wait_ready(20)
    process = psutil.Process(server.pid)
    server.stop()
    assert not process.is_running()


def test_one_that_ends_while_starting_is_launched_again(tmp_path: Path) -> None:
    server = Little(tmp_path, ENDING_ONCE)
    server.start()
    server.wait_ready(20)
    server.stop()


def test_one_that_always_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    server = Little(tmp_path, "import sys; sys.exit('the disk is full')")
    server.start()
    with pytest.raises(NotReadyError, match=r"little did not become ready(.|\n)*the disk is full"):
        server.wait_ready(20)


def test_stopping_what_never_started_does_nothing(tmp_path: Path) -> None:
    server = Little(tmp_path, LISTENING)
    server.stop()
    server.kill()
    assert server.pid is None


def test_end_kills_what_does_not_listen_to_the_signal(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    process = subprocess.Popen([sys.executable, "-c", STUBBORN, "", str(marker)])
    wait_until(marker.exists, time.monotonic() + 20, "no marker")
    end([psutil.Process(process.pid)], grace_seconds=0.2)
    assert process.poll() is not None


def test_waiting_ends_at_the_deadline() -> None:
    with pytest.raises(NotReadyError, match="Nothing came within the time allowed"):
        wait_until(lambda: False, time.monotonic() + 0.1, "Nothing came")


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    """As a program has it: an earlier test's event loop may have left its own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_ctrl_c_is_held_back_until_the_block_is_done() -> None:
    done: list[str] = []

    def clean_up() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        clean_up()
    assert done == ["cleaned up"]


def test_outside_the_main_thread_nothing_is_held_back() -> None:
    entered = []

    def enter() -> None:
        with uninterrupted():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


async def test_a_coroutine_runs_apart_from_the_running_loop() -> None:
    ran = []

    async def note() -> None:
        ran.append(True)

    run_apart(note())
    assert ran == [True]


def test_the_end_of_a_log_is_readable(tmp_path: Path) -> None:
    log = tmp_path / "log"
    failure = '{"level": "error", "event": "stopped", "exception": "Traceback\\n  …\\nKeyError: 1"}'
    log.write_text("\n".join(["first", failure, '{"other": 1}', "[1]", "x" * 999]))
    lines = last_lines(log, 4).split("\n")
    assert lines[0] == "error  stopped  KeyError: 1"
    assert lines[1:3] == ['{"other": 1}', "[1]"]
    assert len(lines[3]) == 300
    assert last_lines(tmp_path / "none") == "(no output)"
