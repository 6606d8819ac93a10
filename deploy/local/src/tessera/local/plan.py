"""What runs for one checkout: which servers and services, where, as whom, with which variables. Derived, never stored."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tessera.local.credentials import Credentials
from tessera.local.environment import (
    ALL_ROLES,
    SERVICES,
    Addresses,
    common_environment,
    instance_environment,
    password_environment,
    service_program,
    settings_file,
)
from tessera.local.files import replace_text
from tessera.local.folders import CHECKOUT
from tessera.local.kafka import Kafka, KafkaLimits, cached_distribution
from tessera.local.ports import LOOPBACK
from tessera.local.postgres import Postgres
from tessera.local.processes import Command, Server
from tessera.local.redis import Redis
from tessera.local.settings import LocalSettings
from tessera.local.supervision import SERVERS, Program
from tessera.local.supervision import SERVICES as SERVICE_GROUP

_GRACE_SECONDS = 45


@dataclass(frozen=True)
class Instance:
    """One process of a service."""

    name: str
    service: str
    admin_port: int


class Plan:
    """Everything about the platform of one state folder. Reading it has no effect but the making of missing secrets."""

    def __init__(self, home: Path, settings: LocalSettings, ports: Mapping[str, int], given: Mapping[str, str]) -> None:
        self.home = home
        self.settings = settings
        self.ports = ports
        self.given = given
        self.credentials = Credentials(home / "secrets.json")

    @property
    def url(self) -> str:
        """Base address of the gateway."""
        return f"http://{LOOPBACK}:{self.gateway_port}"

    @property
    def gateway_port(self) -> int:
        """The port that all gateway processes share."""
        return self.settings.gateway_port or self.ports["gateway"]

    @cached_property
    def api_key(self) -> str:
        """The development key."""
        return self.credentials.kept("api_key", _new_api_key)

    @cached_property
    def servers(self) -> list[Server]:
        """The servers that we run: those without a given address."""
        run = self.home / "run" / SERVERS
        limits = KafkaLimits(self.settings.kafka_heap_megabytes, self.settings.kafka_segment_bytes, self.settings.kafka_retention_bytes)
        all_servers: dict[str, Server] = {
            "KAFKA_BOOTSTRAP_SERVERS": Kafka(
                self.home / "kafka", self.ports["kafka"], self.ports["controller"], cached_distribution(), limits, record=run / "kafka.json"
            ),
            "DATABASE_URL": Postgres(
                self.home / "postgres", self.ports["postgres"], self.credentials["postgres"], record=run / "postgres.json"
            ),
            "REDIS_URL": Redis(self.home / "redis", self.ports["redis"], self.credentials["redis"], record=run / "redis.json"),
        }
        return [server for variable, server in all_servers.items() if variable not in self.given]

    @cached_property
    def addresses(self) -> Addresses:
        """Given addresses, else our own."""
        kafka = self.given.get("KAFKA_BOOTSTRAP_SERVERS", f"{LOOPBACK}:{self.ports['kafka']}")
        own_postgres = f"postgresql://postgres:{self.credentials['postgres']}@{LOOPBACK}:{self.ports['postgres']}/postgres"
        own_redis = f"redis://:{self.credentials['redis']}@{LOOPBACK}:{self.ports['redis']}/0"
        return Addresses(kafka, self.given.get("DATABASE_URL", own_postgres), self.given.get("REDIS_URL", own_redis))

    @property
    def instances(self) -> list[Instance]:
        """All service processes: one of each, and the gateways."""
        names = [f"gateway-{number}" for number in range(1, self.settings.gateway_processes + 1)]
        gateways = [Instance(name, "gateway", self.ports[name]) for name in names]
        return [*gateways, *(Instance(service, service, self.ports[service]) for service in SERVICES if service != "gateway")]

    def client_environment(self) -> dict[str, str]:
        """What `make env` prints."""
        database = self._common(())["TESSERA__POSTGRES__DATABASE"]
        return {
            "TESSERA_URL": self.url,
            "TESSERA_API_KEY": self.api_key,
            "KAFKA_BOOTSTRAP_SERVERS": self.addresses.kafka_bootstrap_servers,
            "DATABASE_URL": urlunsplit(urlsplit(self.addresses.database_url)._replace(path=f"/{database}")),
            "REDIS_URL": self.addresses.redis_url,
        }

    def operator_environment(self) -> dict[str, str]:
        """For bootstrap, migrations and topics: the administrator and every role's password."""
        passwords: dict[str, str] = {}
        for service in SERVICES:
            passwords |= password_environment(service, self._role_password, ALL_ROLES)
        return {**self._common(SERVICES), **passwords, "TESSERA_ADMIN_DATABASE_URL": self.addresses.database_url}

    def instance_environment(self, instance: Instance) -> dict[str, str]:
        """For one service process."""
        own = instance_environment(instance.service, instance.name, instance.admin_port)
        passwords = password_environment(instance.service, self._role_password)
        return {**self._common([instance.service]), **own, **passwords, **(self._gateway() if instance.service == "gateway" else {})}

    def programs(self) -> list[Program]:
        """What supervisord runs. Writes the variables of each service to a file of its own, readable by the owner alone."""
        servers = [Program(server.name, SERVERS, server.command()) for server in self.servers]
        return [*servers, *(self._service_program(instance) for instance in self.instances)]

    def fingerprint(self, instance: Instance) -> str:
        """Changes when the process must be started again: its variables, its code, the libraries, the locked packages."""
        code = [CHECKOUT / "services" / instance.service / "src", *sorted((CHECKOUT / "libs").glob("*/src"))]
        variables = json.dumps(self.instance_environment(instance), sort_keys=True)
        return digest([*code, CHECKOUT / "requirements.lock"], variables)

    def _role_password(self, role: str) -> str:
        return self.credentials[f"postgres_{role}"]

    def _service_program(self, instance: Instance) -> Program:
        variables = self.home / "run" / "environments" / f"{instance.name}.json"
        replace_text(variables, json.dumps(self.instance_environment(instance), indent=2), mode=0o600)
        command = Command(
            program=service_program(instance.service, sys.executable),
            cwd=self.home,
            stop_signal=signal.SIGTERM,
            record=self.home / "run" / SERVICE_GROUP / f"{instance.name}.json",
            environment=variables,
        )
        return Program(instance.name, SERVICE_GROUP, command, stop_seconds=_GRACE_SECONDS)

    def _common(self, services: Iterable[str]) -> dict[str, str]:
        """What we know, under what a person set for all services or for these."""
        traces = {
            "TESSERA__TELEMETRY__TRACE_FOLDER": str(self.home / "traces"),
            "TESSERA__TELEMETRY__TRACE_FOLDER_BYTES": str(self.settings.trace_bytes),
        }
        prefixes = ("TESSERA__", "TESSERA_SECRETS", "TESSERA_SETTINGS_FILE", *(f"TESSERA_{service.upper()}__" for service in services))
        told = {name: value for name, value in {**settings_file(), **os.environ}.items() if value and name.startswith(prefixes)}
        return {**common_environment(self.addresses, self.home), **traces, **told}

    def _gateway(self) -> dict[str, str]:
        return {
            "TESSERA_GATEWAY__PORT": str(self.gateway_port),
            "TESSERA_GATEWAY__BOOTSTRAP_KEY": self.api_key,
            "TESSERA_GATEWAY__KEY_PEPPER": self.credentials["key_pepper"],
        }


def _new_api_key() -> str:
    """A key in the form that the gateway accepts; only the gateway knows the form."""
    command = [sys.executable, "-m", "tessera.gateway.development_key"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def port_names(settings: LocalSettings) -> list[str]:
    """Everything that listens."""
    gateways = [f"gateway-{number}" for number in range(1, settings.gateway_processes + 1)]
    services = [service for service in SERVICES if service != "gateway"]
    return ["kafka", "controller", "postgres", "redis", "supervisor", "gateway", *gateways, *services]


def digest(paths: Iterable[Path], extra: str = "") -> str:
    """A hash of the contents of files and folders, without compiled files."""
    total = hashlib.sha256(extra.encode())
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts) if path.is_dir() else [path]
        for file in filter(Path.exists, files):
            total.update(str(file.relative_to(CHECKOUT)).encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
