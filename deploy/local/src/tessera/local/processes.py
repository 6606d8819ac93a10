"""Processes by identity (process id and start time), and the server that every recipe of this package is."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import psutil

from tessera.local.errors import LocalError, NotReadyError
from tessera.local.identity import is_same

_POLL_SECONDS = 0.05
_LOG_LINES = 20
_LINE_LENGTH = 300
# Python warns about a child that is forgotten while it runs.
_OUTLIVING: list["subprocess.Popen[bytes]"] = []
# Linux ends a child when the *thread* that started it ends: one thread that lives as long as the process starts them all.
_SPAWNER = ThreadPoolExecutor(1, "spawner")


@dataclass(frozen=True)
class Command:
    """How a server is run: everything that supervisor, or a test, needs to know."""

    program: tuple[str, ...]
    cwd: Path
    stop_signal: signal.Signals
    """Asks for a clean end; also sent when the parent dies."""
    lock: Path | None = None
    """Held for the life of the process: one server per folder."""
    ports: tuple[int, ...] = ()
    """Refused at the start when somebody listens there."""
    record: Path | None = None
    """Where process id and start time are noted."""
    user: str | None = None
    """Runs as this user when started by root."""
    traverse: bool = False
    """The user may pass folders that only root may enter (a checkout under /root)."""
    environment: Path | None = None
    """JSON object of variables for the process."""
    outlives: bool = False
    """Goes on when the process that started it ends."""

    def launched(self) -> list[str]:
        """The argument list that goes through `tessera.local.launch`."""
        return [sys.executable, "-m", "tessera.local.launch", *self.options()]

    def options(self) -> list[str]:
        """The arguments of `tessera.local.launch`."""
        options = ["--cwd", str(self.cwd)]
        options += [] if self.outlives else ["--death-signal", self.stop_signal.name.removeprefix("SIG")]
        options += [word for port in self.ports for word in ("--port", str(port))]
        named = {"--lock": self.lock, "--record": self.record, "--user": self.user, "--environment": self.environment}
        options += [word for name, value in named.items() if value is not None for word in (name, str(value))]
        options += ["--traverse"] if self.traverse else []
        return [*options, "--", *self.program]


def wait_until(condition: Callable[[], bool], deadline: float, what: str) -> None:
    """Poll until true; raises NotReadyError naming `what` when `time.monotonic()` passes the deadline. Blocks."""
    while not condition():
        if time.monotonic() > deadline:
            raise NotReadyError(f"{what} within the time allowed.")
        time.sleep(_POLL_SECONDS)


def recorded(file: Path) -> psutil.Process | None:
    """The live process that the record names, or None when it ended (a reused process id is not taken for it)."""
    try:
        known = json.loads(file.read_text())
        process = psutil.Process(known["pid"])
        return process if is_same(known) and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None


def end(processes: Iterable[psutil.Process], stop_signal: signal.Signals = signal.SIGTERM, grace_seconds: float = 12) -> None:
    """Ask all of them at once to stop, kill those that have not after the grace, and wait until they are gone. Blocks."""
    alive = list(processes)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(stop_signal)
    _, stubborn = psutil.wait_procs(alive, grace_seconds)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, grace_seconds)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done, so that cleaning up is never left half done. Only the main thread is interrupted anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


class Child(Protocol):
    """A process that was started here, as `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Its number, which is no other's until it has been polled or waited for after its end."""

    def poll(self) -> int | None:
        """The exit code, None while it lives."""

    def wait(self, timeout: float | None = None) -> int:
        """Blocks; raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int, /) -> None:
        """Nothing where it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


class Server(ABC):
    """One server of the stack in one folder. The recipes say what to prepare and run; this class is its life as a child process.

    Not thread-safe. The child ends with this process, however that ends (Linux).
    """

    name: ClassVar[str]
    grace_seconds: float = 12
    """How long `stop` waits before it kills."""
    starts_allowed: int = 20
    """How often `wait_ready` launches one that ends while starting."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self._process: Child | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Make the folder, its configuration and an empty data folder where they are missing. Idempotent. Blocks for seconds."""

    @abstractmethod
    def command(self) -> Command:
        """How to run it, once prepared."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it does real work for a client now. Blocks for at most a few seconds."""

    @property
    def log(self) -> Path:
        """Output of the process started by `start`."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Process id while the child lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Prepare and launch; returns before it is ready. Starting a live server is an error."""
        if self.pid is not None:
            raise LocalError(f"{self.name} is already running.")
        self.prepare()
        self._launch()

    def wait_ready(self, timeout_seconds: float = 60) -> None:
        """Block until it answers. One that ends while starting (stale shared memory after SIGKILL does that) is launched again.

        Raises NotReadyError with the last lines of its log.
        """
        deadline = time.monotonic() + timeout_seconds
        starts = 1
        while not self.answers():
            ended = self.pid is None
            if time.monotonic() > deadline or (ended and starts >= self.starts_allowed):
                raise NotReadyError(f"{self.name} did not become ready; its last lines:\n{last_lines(self.log)}")
            if ended:
                starts += 1
                self._launch()
            time.sleep(_POLL_SECONDS * starts)

    def stop(self) -> None:
        """Ask it to end, kill it after `grace_seconds`, and wait. A server that never started, or has ended, is left alone."""
        with uninterrupted():
            process = self._released()
            if process is None:
                return
            if process.poll() is None:
                process.send_signal(self.command().stop_signal)
            try:
                process.wait(self.grace_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash would; returns when the process is gone. `start` brings it back on the same data."""
        process = self._released()
        if process is not None:
            process.kill()
            process.wait()

    def _launch(self) -> None:
        _SPAWNER.submit(self._spawn).result()

    def _spawn(self) -> None:
        self._process = self._new_process()

    def _new_process(self) -> Child:
        return spawn(self.command(), self.log)

    def _released(self) -> Child | None:
        """The child, also one whose start was interrupted, which is then no longer ours to watch."""
        _SPAWNER.submit(int).result()  # behind a start that is still under way
        process, self._process = self._process, None
        return process


def spawn(command: Command, log: Path) -> subprocess.Popen[bytes]:
    """Start a command through `tessera.local.launch` with its output appended to `log`.

    A session of its own keeps a terminal's Ctrl-C away from it: whoever owns the stack stops it in order.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command.launched(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    if command.outlives:
        _OUTLIVING.append(process)
    return process


def run_apart(coroutine: Coroutine[object, object, None]) -> None:
    """Run a coroutine to its end on a loop of its own, also when the caller stands inside a running loop. Blocks."""
    with ThreadPoolExecutor(1) as apart:
        apart.submit(asyncio.run, coroutine).result()


def last_lines(file: Path, count: int = _LOG_LINES) -> str:
    """The end of a log, for a message: JSON lines are reduced to what happened, long ones are cut."""
    if not file.exists():
        return "(no output)"
    return "\n".join(_readable(line)[:_LINE_LENGTH] for line in file.read_text(errors="replace").splitlines()[-count:])


def _readable(line: str) -> str:
    try:
        entry = json.loads(line)
        told = [entry.get("level"), entry["event"], entry.get("error"), str(entry.get("exception", "")).strip().rpartition("\n")[2]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return line
    return "  ".join(str(part) for part in told if part)
