"""The whole platform for a test: six service processes over a database, topics and a key of their own."""

import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tessera.local.environment import SERVICES, Addresses, common_environment
from tessera.testkit.databases import PostgresDatabase, new_database
from tessera.testkit.events import unique_kafka_prefix
from tessera.testkit.http import http_request
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack

_PARTITIONS = 4
_READY_SECONDS = 60
_MIGRATING = threading.Lock()  # Alembic keeps its context in module globals


@dataclass
class Platform:
    """Real service processes on the test stack; other tests' platforms do not see its topics or rows.

    `settings` are further variables for every process, such as `TESSERA_GENERATOR__…`.
    """

    stack: Stack
    services: tuple[str, ...] = SERVICES
    settings: Mapping[str, str] = field(default_factory=dict)
    kafka_prefix: str = field(default_factory=unique_kafka_prefix)
    processes: dict[str, ServiceProcess] = field(default_factory=dict)
    _database: PostgresDatabase | None = None

    @property
    def home(self) -> Path:
        """Holds `logs/` and `traces/` of every process, as the state folder of `make run` does."""
        return self.stack.folder / self.kafka_prefix.strip(".")

    @property
    def database(self) -> PostgresDatabase:
        """Its database. Raises RuntimeError before `start`."""
        if self._database is None:
            raise RuntimeError("the platform was not started")
        return self._database

    @property
    def url(self) -> str:
        """Base address of the gateway."""
        return self.processes["gateway"].url

    def start(self) -> None:
        """Make database and topics, start every service and wait until all are ready. Blocks."""
        for name in ("logs", "traces", "objects"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self._key = subprocess.run(
            [sys.executable, "-m", "tessera.gateway.development_key"], check=True, capture_output=True, text=True
        ).stdout.strip()
        with _MIGRATING:
            self._database = new_database(self.stack, self.services)
        self.command("tessera.bus.make_topics")
        if self.stack.is_secured:
            self.command("tessera.bus.make_acls", "--apply")
        self.processes = {service: self._process(service) for service in self.services}
        for process in self.processes.values():
            process.start()
        self.wait_ready()

    def wait_ready(self, services: Iterable[str] | None = None) -> None:
        """Wait until these services (all where None) say that they are ready. Blocks."""
        for service in self.services if services is None else services:
            self.processes[service].wait_ready(_READY_SECONDS)

    def stop(self) -> None:
        """Stop every process at once and drop the database. May be called twice. Blocks."""
        with ThreadPoolExecutor(max(1, len(self.processes))) as stopping:
            list(stopping.map(ServiceProcess.stop, self.processes.values()))
        if self._database is not None:
            self._database.drop()
            self._database = None

    @property
    def admin_key(self) -> str:
        """The bootstrap key, which may do everything."""
        return self._key

    def tenant(self, name: str) -> str:
        """Make a tenant with its topics; its new key. Blocks."""
        self.request("POST", "/v1/tenants", json={"id": name}).raise_for_status()
        answer = self.request("POST", "/v1/keys", json={"tenant_id": name, "name": "test"})
        answer.raise_for_status()
        return str(answer.json()["key"])

    def request(self, method: str, path: str, *, key: str = "", **arguments: Any) -> httpx.Response:
        """One request to the gateway, with the bootstrap key where none is given. Blocks."""
        headers = {"Authorization": f"Bearer {key or self._key}", **arguments.pop("headers", {})}
        return http_request(method, f"{self.url}{path}", headers=headers, **{"timeout": 60, **arguments})

    def client_environment(self) -> dict[str, str]:
        """What `make env` prints, for this platform, and where its logs and traces lie."""
        return {
            "TESSERA_URL": self.url,
            "TESSERA_API_KEY": self._key,
            "KAFKA_BOOTSTRAP_SERVERS": self.stack.kafka_bootstrap_servers,
            "DATABASE_URL": self.database.admin_url,
            "REDIS_URL": self.stack.redis_url,
            "TESSERA_HOME": str(self.home),
        }

    def command(self, module: str, *arguments: str) -> None:
        """Run a module as an operator would, against this platform's Kafka. Raises CalledProcessError. Blocks."""
        addresses = Addresses(self.stack.kafka_bootstrap_servers, self.stack.database_url, self.stack.redis_url)
        environment = {
            **common_environment(addresses, self.home),
            "TESSERA__PROFILE": "test",
            "TESSERA__KAFKA__TOPIC_PREFIX": self.kafka_prefix,
            "TESSERA__KAFKA__KEYED_PARTITIONS": str(_PARTITIONS),
            **self.stack.environment(None),
        }
        subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)

    def _process(self, service: str) -> ServiceProcess:
        environment = {
            "TESSERA__TELEMETRY__LOG_FILE": str(self.home / "logs" / f"{service}.log"),
            "TESSERA__TELEMETRY__TRACE_FOLDER": str(self.home / "traces"),
            "TESSERA__OBJECTS__URL": (self.home / "objects").as_uri(),
            **({"TESSERA_GATEWAY__BOOTSTRAP_KEY": self._key} if service == "gateway" else {}),
            **self.settings,
        }
        return ServiceProcess(service, self.stack, self.database, self.kafka_prefix, environment)
