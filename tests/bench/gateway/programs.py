"""A program that the bench starts and ends, by its process id."""

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from tessera.local.files import replace_text
from tessera.local.ports import LOOPBACK, accepts_connections
from tessera.local.processes import Command, Server

_ROLES = Path(__file__).with_name("roles.py")


class Program(Server):
    """Listens at `port`, where it has one. Ends with this process, whatever becomes of it."""

    name: ClassVar[str] = "program"
    starts_allowed = 1

    def __init__(self, folder: Path, port: int, program: tuple[str, ...], environment: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, port)
        self._program = program
        self._environment = dict(environment or {})

    def prepare(self) -> None:
        """Its folder and its variables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self._variables, json.dumps(self._environment), mode=0o600)

    def command(self) -> Command:
        """SIGTERM ends it."""
        ports = (self.port,) if self.port else ()
        return Command(self._program, cwd=self.folder, stop_signal=signal.SIGTERM, ports=ports, environment=self._variables)

    def answers(self) -> bool:
        """Whether it listens; one without a port is taken at its word."""
        return self.pid is not None and (not self.port or accepts_connections(f"{LOOPBACK}:{self.port}"))

    @property
    def _variables(self) -> Path:
        return self.folder / "environment.json"


def role(folder: Path, name: str, port: int, environment: Mapping[str, str]) -> Program:
    """One of `roles.py`."""
    return Program(folder / name, port, (sys.executable, str(_ROLES), name), {"BENCH_PORT": str(port), **environment})
