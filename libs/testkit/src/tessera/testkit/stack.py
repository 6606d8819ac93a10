"""The stack that tests run against: given addresses, else the local recipes, else containers. Never a skip."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tessera.local.environment import given_addresses
from tessera.local.errors import LocalError, MissingToolError
from tessera.local.folders import home
from tessera.local.kafka import Kafka, KafkaLimits, cached_distribution, kafka_answers
from tessera.local.launch import record
from tessera.local.ports import free_ports
from tessera.local.postgres import Postgres, binaries, postgres_answers
from tessera.local.processes import Server, recorded, uninterrupted
from tessera.local.redis import Redis, program, redis_answers
from tessera.local.tools import java
from tessera.testkit import containers
from tessera.testkit.kafka import CopiedKafka

_PREFIX = "tessera-test-"
_OWNER = "owner.json"
_REMOVALS = 5
_HEAP_MEGABYTES = 320
_PASSWORD = "only-for-tests"  # noqa: S105 - the server lives for one test run on loopback


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{psutil.Process().pid}-"))
    folder.chmod(0o755)  # Postgres runs as another user when this is root
    record(folder / _OWNER)
    return folder


@dataclass
class Stack:
    """One Kafka, one Postgres and one Redis for a whole test run; tests keep apart by topic prefix and database.

    A server is None when its address was given or it runs in a container; chaos tests need one that they may kill.
    """

    kafka_bootstrap_servers: str = ""
    database_url: str = ""
    """Address of an administrator who may create databases and roles."""
    redis_url: str = ""
    folder: Path = Path()
    """Removed at the end of the run."""
    kafka: Kafka | None = None
    postgres: Postgres | None = None
    redis: Redis | None = None
    kafka_limits: KafkaLimits = field(default_factory=lambda: KafkaLimits(heap_megabytes=_HEAP_MEGABYTES))
    durable: bool = False
    """Whether Postgres syncs to disk, as it must where something is measured."""
    _cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self) -> None:
        """Start what is not given and wait until all of it answers. Raises LocalError; leaves nothing behind when it fails. Blocks."""
        with uninterrupted():
            self.folder = _folder()
            self._cleanup.callback(_remove, self.folder)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop what was started and remove the folder. May be called twice."""
        with uninterrupted():
            self._cleanup.close()

    @property
    def is_secured(self) -> bool:
        """Whether services need access control lists before they may do anything."""
        return False

    def environment(self, service: str | None) -> dict[str, str]:
        """Variables that a process of `service` (an administrator's where None) needs beside the addresses: none on this stack."""
        return {}

    def _start(self) -> None:
        for provide in (self._provide_kafka, self._provide_postgres, self._provide_redis):
            provide()
        for server in (self.kafka, self.postgres, self.redis):
            if server is not None:
                server.wait_ready()

    def _provide_kafka(self) -> None:
        self.kafka_bootstrap_servers = _given("KAFKA_BOOTSTRAP_SERVERS", kafka_answers)
        if self.kafka_bootstrap_servers:
            return
        distribution = cached_distribution()
        if not _available(distribution.ensure, java):
            self.kafka_bootstrap_servers = self._cleanup.enter_context(containers.kafka())
            return
        ports = free_ports(("broker", "controller"))
        self.kafka = CopiedKafka(self.folder / "kafka", ports["broker"], ports["controller"], distribution, self.kafka_limits)
        self._own(self.kafka)
        self.kafka_bootstrap_servers = self.kafka.bootstrap_servers

    def _provide_postgres(self) -> None:
        self.database_url = _given("DATABASE_URL", postgres_answers)
        if self.database_url:
            return
        if not _available(binaries):
            self.database_url = self._cleanup.enter_context(containers.postgres())
            return
        self.postgres = Postgres(self.folder / "postgres", free_ports(("postgres",))["postgres"], _PASSWORD, durable=self.durable)
        self._own(self.postgres)
        self.database_url = self.postgres.database_url

    def _provide_redis(self) -> None:
        self.redis_url = _given("REDIS_URL", redis_answers)
        if self.redis_url:
            return
        if not _available(program):
            self.redis_url = self._cleanup.enter_context(containers.redis())
            return
        self.redis = Redis(self.folder / "redis", free_ports(("redis",))["redis"], _PASSWORD)
        self._own(self.redis)
        self.redis_url = self.redis.redis_url

    def _own(self, server: Server) -> None:
        self._cleanup.callback(server.stop)
        server.start()


def remove_abandoned() -> None:
    """Remove the folders of test runs that were killed; their servers ended with them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid() and (folder / _OWNER).exists() and recorded(folder / _OWNER) is None:
                _remove(folder)


def _remove(folder: Path) -> None:
    """A process that has just been told to end may still write: try again until the folder is gone."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _given(variable: str, answers: Callable[[str], bool]) -> str:
    """The address in the environment, checked; empty when there is none, or when it is that of this checkout's own running platform."""
    address = given_addresses(_remembered_ports()).get(variable, "")
    if address and not answers(address):
        raise LocalError(f"{variable} is set, but nothing answers there.")
    return address


def _remembered_ports() -> dict[str, int]:
    file = home() / "ports.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _available(*checks: Callable[[], object]) -> bool:
    """Whether the local recipe can run here. Without it, and without a Docker engine, the reason is raised: nothing is skipped."""
    try:
        for check in checks:
            check()
    except MissingToolError:
        if containers.engine_answers():
            return False
        raise
    return True
