"""A real service process for a test: started, waited for, killed, started again."""

import atexit
import http.client
import json
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from tessera.local.environment import Addresses, common_environment, instance_environment, service_program
from tessera.local.files import replace_text
from tessera.local.ports import LOOPBACK, free_ports
from tessera.local.processes import Child, Command, Server, spawn
from tessera.testkit.databases import PostgresDatabase
from tessera.testkit.forking import ForkServer
from tessera.testkit.stack import Stack

_PROBE_SECONDS = 2
_PARTITIONS = 4
_INTERPRETERS = ("LD_", "PYTHON")
"""Variables that are read before a service is."""
_FORK_SERVER = ForkServer()
atexit.register(_FORK_SERVER.close)


class ServiceProcess(Server):
    """One process of one service in the profile `test`; `stop` sends SIGTERM and lets it drain, `kill` does not."""

    name: ClassVar[str] = "service"
    grace_seconds: float = 30
    starts_allowed: int = 1

    def __init__(
        self, service: str, stack: Stack, database: PostgresDatabase | None, kafka_prefix: str, environment: Mapping[str, str]
    ) -> None:
        ports = free_ports(("admin", "http"))
        super().__init__(stack.folder / "services" / f"{service}-{uuid.uuid4().hex[:8]}", ports["admin"])
        self.service = service
        self.http_port = ports["http"]
        self._stack = stack
        self._database = database
        self._kafka_prefix = kafka_prefix
        self._overrides = dict(environment)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Ready inside the block, stopped afterwards. Blocks."""
        self.start()
        try:
            self.wait_ready()
            yield self
        finally:
            self.stop()

    @property
    def url(self) -> str:
        """Base address of the gateway's HTTP port."""
        return f"http://{LOOPBACK}:{self.http_port}"

    @property
    def admin_url(self) -> str:
        """Base address of the admin port."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """Exit code once it ended by itself (negative: the signal); None while it lives."""
        return self._process.poll() if self._process is not None else None

    def override(self, **environment: str) -> None:
        """Variables for the next start, e.g. `TESSERA_MEMORY__CRASH_POINT="…"`; an empty value removes one."""
        self._overrides |= environment

    def prepare(self) -> None:
        """Write the variables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self._environment_file, json.dumps(self._environment()), mode=0o600)

    def command(self) -> Command:
        """The service as `make run` starts it."""
        return Command(
            program=service_program(self.service, sys.executable),
            cwd=self.folder,
            stop_signal=signal.SIGTERM,
            environment=self._environment_file,
        )

    def _new_process(self) -> Child:
        """By fork from a process that has it imported, unless the interpreter itself is to be told something, or another program runs."""
        command = self.command()
        told = [name for name in self._overrides if name.startswith(_INTERPRETERS)]
        if sys.platform != "linux" or told or command.program != service_program(self.service, sys.executable):
            return spawn(command, self.log)
        return _FORK_SERVER.start(self.service, command.options(), self.log)

    def answers(self) -> bool:
        """Whether it says that it is ready."""
        try:
            return self.get_admin("/health/ready")[0] == http.client.OK
        except (OSError, http.client.HTTPException):
            return False

    def get_admin(self, path: str) -> tuple[int, str]:
        """Status and body of an admin path. Blocks."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=_PROBE_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def readiness(self, dependency: str) -> tuple[int, str, str]:
        """Status of readiness, its word, and the state of a dependency's breaker; (0, "", "") while nothing answers. Blocks."""
        try:
            status, body = self.get_admin("/health/ready")
        except (OSError, http.client.HTTPException):
            return 0, "", ""
        report = json.loads(body)
        return status, str(report["status"]), str(report["dependencies"][dependency]["breaker"])

    def log_records(self) -> list[dict[str, Any]]:
        """Every JSON line that it logged, over all its starts."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def _environment_file(self) -> Path:
        return self.folder / "environment.json"

    def _environment(self) -> dict[str, str]:
        addresses = Addresses(self._stack.kafka_bootstrap_servers, self._stack.database_url, self._stack.redis_url)
        everything = {
            **common_environment(addresses, self.folder),
            **instance_environment(self.service, self.folder.name, self.port),
            "TESSERA__PROFILE": "test",
            "TESSERA__KAFKA__TOPIC_PREFIX": self._kafka_prefix,
            "TESSERA__KAFKA__KEYED_PARTITIONS": str(_PARTITIONS),
            **(self._database.environment(self.service) if self._database else {}),
            **self._stack.environment(self.service),
            **({"TESSERA_GATEWAY__PORT": str(self.http_port)} if self.service == "gateway" else {}),
            **self._overrides,
        }
        return {name: value for name, value in everything.items() if value}
