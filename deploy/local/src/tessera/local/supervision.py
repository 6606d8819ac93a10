"""supervisord keeps the programs of one checkout running; this writes its configuration and talks to it."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy  # nosec B411 - only our own supervisor, on loopback, with a password

from tessera.local.errors import LocalError
from tessera.local.files import replace_text
from tessera.local.ports import LOOPBACK
from tessera.local.processes import Command, end, last_lines, recorded, spawn, wait_until

_USER = "tessera"
_START_SECONDS = 15
_STOP_SECONDS = 90
_RUNNING = ("RUNNING", "STARTING")
SERVERS = "servers"
SERVICES = "services"

# Paths are relative to the state folder, because supervisord expands some values once and others twice.
_HEAD = """\
[supervisord]
nodaemon=true
logfile=logs/supervisord.log
logfile_maxbytes={log_bytes}
logfile_backups=1
pidfile=run/supervisord.pid
childlogdir=logs
umask=022
{user}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[inet_http_server]
port={host}:{port}
username={username}
password={password}
"""

_PROGRAM = """
[program:{name}]
command={command}
autostart={autostart}
autorestart=true
startsecs=1
startretries=10
stopsignal={stop_signal}
stopwaitsecs={stop_seconds}
redirect_stderr=true
stdout_logfile=logs/{name}.log
stdout_logfile_maxbytes={log_bytes}
stdout_logfile_backups=1
"""


@dataclass(frozen=True)
class Program:
    """One supervised process."""

    name: str
    group: str
    command: Command
    stop_seconds: int = 15
    """How long it may take to stop before it is killed."""


class Supervisor:
    """The supervisord of one state folder. Methods block; they raise LocalError when it does not do what is asked."""

    def __init__(self, home: Path, port: int, password: str, log_bytes: int) -> None:
        self._home = home
        self._run = home / "run"
        self._logs = home / "logs"
        self._port = port
        self._password = password
        self._log_bytes = log_bytes

    @property
    def configuration(self) -> Path:
        """The generated file; holds a password, readable by the owner alone."""
        return self._run / "supervisord.conf"

    @property
    def record(self) -> Path:
        """Process id and start time of supervisord."""
        return self._run / "supervisord.json"

    def is_running(self) -> bool:
        """Whether our supervisord lives and answers."""
        if recorded(self.record) is None:
            return False
        try:
            return bool(self._call("getState")["statename"] == "RUNNING")
        except (OSError, HTTPException, Fault):
            return False

    def states(self) -> Mapping[str, Mapping[str, Any]]:
        """What supervisord says of each program, by name; nothing when it does not run."""
        return {info["name"]: info for info in self._call("getAllProcessInfo")} if self.is_running() else {}

    def start(self, programs: Iterable[Program]) -> None:
        """Run supervisord on these programs, in a session of its own. One that already runs on the same configuration is kept."""
        text = self._text(list(programs))
        if self.is_running() and self.configuration.exists() and self.configuration.read_text() == text:
            return
        self.shutdown()
        replace_text(self.configuration, text, mode=0o600)
        self._logs.mkdir(parents=True, exist_ok=True)
        program = (sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self.configuration))
        output = self._logs / "supervisord.out"
        output.unlink(missing_ok=True)
        process = spawn(Command(program, self._home, stop_signal=signal.SIGTERM, record=self.record, outlives=True), output)
        deadline = time.monotonic() + _START_SECONDS
        wait_until(lambda: self.is_running() or process.poll() is not None, deadline, "supervisord did not answer")
        if process.poll() is not None:
            raise LocalError(f"supervisord ended while starting:\n{last_lines(output)}")

    def ensure_started(self, names: Iterable[str]) -> None:
        """Start those of the programs that do not run."""
        states = self.states()
        for name in names:
            if states[name]["statename"] not in _RUNNING:
                self._ask("startProcess", f"{states[name]['group']}:{name}", False)

    def stop_programs(self, names: Iterable[str]) -> None:
        """Ask all of these to stop at once and wait until they have."""
        wanted = set(names)
        for name, info in self.states().items():
            if name in wanted and info["statename"] in (*_RUNNING, "BACKOFF"):
                self._ask("stopProcess", f"{info['group']}:{name}", False)
        deadline = time.monotonic() + _STOP_SECONDS
        wait_until(lambda: all(self.states()[name]["pid"] == 0 for name in wanted), deadline, "A program did not stop")

    def shutdown(self) -> None:
        """Stop services, then servers, then supervisord. Also ends what a supervisord that was killed left running."""
        if self.is_running():
            process = recorded(self.record)
            self._ask("shutdown")
            if process is not None:
                process.wait(_STOP_SECONDS)
        self.end_orphans()

    def end_orphans(self) -> None:
        """End every recorded process that still lives: services first. Their records outlive a crash of anything."""
        for group in ("supervisord", SERVICES, SERVERS):
            files = [self.record] if group == "supervisord" else (self._run / group).glob("*.json")
            end(filter(None, map(recorded, files)))

    def _ask(self, method: str, *arguments: object) -> None:
        try:
            self._call(method, *arguments)
        except (OSError, HTTPException) as error:
            raise LocalError(f"supervisord does not answer: {error}") from error
        except Fault as fault:
            if not fault.faultString.startswith(("ALREADY_STARTED", "NOT_RUNNING")):
                raise LocalError(f"supervisord refused {method} {arguments}: {fault.faultString}") from fault

    def _call(self, method: str, *arguments: object) -> Any:
        with ServerProxy(f"http://{_USER}:{self._password}@{LOOPBACK}:{self._port}/RPC2") as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def _text(self, programs: list[Program]) -> str:
        head = _HEAD.format(
            log_bytes=self._log_bytes,
            user="user=root\n" if os.geteuid() == 0 else "",
            host=LOOPBACK,
            port=self._port,
            username=_USER,
            password=self._password,
        )
        groups = "".join(_group(name, programs) for name in (SERVERS, SERVICES))
        return head + "".join(self._section(program) for program in programs) + groups

    def _section(self, program: Program) -> str:
        return _PROGRAM.format(
            name=program.name,
            command=" ".join(map(_quoted, program.command.launched())),
            autostart="true" if program.group == SERVERS else "false",
            stop_signal=program.command.stop_signal.name.removeprefix("SIG"),
            stop_seconds=program.stop_seconds,
            log_bytes=self._log_bytes,
        )


def _group(name: str, programs: list[Program]) -> str:
    """Within a group all stop at once; groups stop one after another, the highest priority number first."""
    members = ",".join(program.name for program in programs if program.group == name)
    priority = {SERVERS: 100, SERVICES: 200}[name]
    return f"\n[group:{name}]\nprograms={members}\npriority={priority}\n" if members else ""


def _quoted(word: str) -> str:
    """One word for supervisord, which splits as a shell does, expands %, and takes ` ;` for a comment."""
    escaped = word.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
