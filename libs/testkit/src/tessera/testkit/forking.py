"""Service processes by fork from a process that has imported them: importing is most of what starting one costs.

`serve` answers one JSON line with one: `{"start": "memory", "launch": […], "log": …}` with the process id, `{"reap": pid}` with the exit
code. It ends with its standard input, and its children with it (`tessera.local.launch` ties them to it). A child does what a started
interpreter does once it has imported the service: it launches, runs `main` and ends as interpreters end. multiprocessing's own fork
server runs the parent's main module again in every child, and leaves its exit handlers out.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import psutil

from tessera.contracts.catalogue import SERVICES
from tessera.local import launch

_BY_THEMSELVES = ("memory", "validator")
"""Imported by their children: ONNX Runtime starts a thread, which no fork has, and DuckDB tells of leaks wherever it was loaded."""


class ForkedProcess:
    """A child of the fork server; of `subprocess.Popen` it has what `tessera.local.processes.Server` needs."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._descriptor = os.pidfd_open(pid)  # its number stays its own until it is reaped, so that no signal reaches another

    def poll(self) -> int | None:
        """The exit code (negative: the signal), None while it lives. Does not block."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Blocks until it has ended; raises subprocess.TimeoutExpired after `timeout` seconds."""
        code = self._ended(None if timeout is None else timeout * 1_000)
        if code is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, milliseconds: float | None) -> int | None:
        if self.returncode is not None:
            return self.returncode
        ending = select.poll()
        ending.register(self._descriptor, select.POLLIN)
        if not ending.poll(milliseconds):
            return None
        self.returncode = self._server.reap(self)
        return self.returncode

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._descriptor)


class ForkServer:
    """The process that forks, started at the first request. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, service: str, launched: Sequence[str], log: Path) -> ForkedProcess:
        """A new process of a service, with the options of `tessera.local.launch`; its output is appended to `log`."""
        log.touch()  # so that it is there as soon as the process is
        with self._lock:
            return ForkedProcess(self, self._asked({"start": service, "launch": list(launched), "log": str(log)}))

    def reap(self, child: ForkedProcess) -> int:
        """The exit code of a child that has ended."""
        with self._lock:
            if child.returncode is None:
                child.returncode = self._asked({"reap": child.pid})
                child.close()
            return child.returncode

    def close(self) -> None:
        """Ends it and every child; the next request starts another."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.communicate()

    def _asked(self, request: dict[str, Any]) -> int:
        if self._process is None:
            self._process = self._begun()
        told, says = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        told.write(json.dumps(request).encode() + b"\n")
        told.flush()
        answer = says.readline()
        if not answer:
            raise ChildProcessError("the fork server has ended")
        return int(answer)

    def _begun(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-c", f"import gc; gc.disable(); from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # with more NumPy would start threads here
        )


def serve() -> None:
    """Forks and reaps as it is told, until standard input ends."""
    for service in SERVICES:
        if service not in _BY_THEMSELVES:
            importlib.import_module(f"tessera.{service}.app")
    if psutil.Process().num_threads() > 1:
        raise RuntimeError("A module started a thread while it was imported: no fork would have it.")
    gc.freeze()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        if "reap" in request:
            _answer(os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1]))
        elif pid := os.fork():
            _answer(pid)
        else:
            _become(request)


def _answer(number: int) -> None:
    os.write(1, b"%d\n" % number)


def _become(request: dict[str, Any]) -> NoReturn:
    os.setsid()
    output = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)
    launch.prepare(launch.options(request["launch"]))
    importlib.import_module(f"tessera.{request['start']}.app").main()
    raise SystemExit
