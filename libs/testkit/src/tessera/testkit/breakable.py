"""A stack whose servers may be killed, filled up and cut off: clients reach each through a proxy that can be told to misbehave."""

import base64
import errno
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tessera.local.files import replace_text
from tessera.local.kafka import Kafka, cached_distribution
from tessera.local.ports import LOOPBACK, free_ports
from tessera.local.postgres import Postgres
from tessera.local.processes import Server
from tessera.local.redis import Redis
from tessera.testkit.fault_proxy import FaultProxy
from tessera.testkit.kafka import CopiedKafka
from tessera.testkit.stack import Stack

SESSION_SECONDS = 3
"""After so long a dead replica is replaced: brokers allow 6 s and more unless told otherwise, and a kill costs one such wait."""
_SPARE_BYTES = 64 * 1024
_FILLINGS = 20
_MEGABYTE = 1024 * 1024


class _FrontedKafka(CopiedKafka):
    """Sends its clients to the proxy."""

    proxy: FaultProxy

    @property
    def bootstrap_servers(self) -> str:
        return f"{LOOPBACK}:{self.proxy.port}"

    def _configuration(self) -> str:
        advertised = f"advertised.listeners=PLAINTEXT://{LOOPBACK}:"
        text = super()._configuration().replace(f"{advertised}{self.port}", f"{advertised}{self.proxy.port}")
        return f"{text}group.min.session.timeout.ms={SESSION_SECONDS * 1000}\n"


class _Member(_FrontedKafka):
    """One of several nodes, each broker and controller."""

    node: int
    voters: str
    cluster_id: str

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "server.properties", self._configuration())
        if (self.folder / "data" / "meta.properties").exists():
            return
        tool = f"kafka.tools.StorageTool format -t {self.cluster_id} -c server.properties"
        subprocess.run(self._distribution.java(tool), cwd=self.folder, check=True, capture_output=True)

    def _configuration(self) -> str:
        lines = []
        for line in super()._configuration().splitlines():
            name = line.partition("=")[0]
            if name == "controller.quorum.bootstrap.servers":
                lines.append(f"controller.quorum.voters={self.voters}")
            elif name.endswith("replication.factor"):
                lines.append(f"{name}=3")
            elif name.endswith("min.isr") or name == "min.insync.replicas":
                lines.append(f"{name}=2")
            else:
                lines.append(f"node.id={self.node}" if name == "node.id" else line)
        return "\n".join(lines) + "\n"


@dataclass
class BreakableStack(Stack):
    """Servers of its own, whatever the environment gives: `kafka`, `postgres` and `redis` are never None once it was started."""

    disks_megabytes: int = 0
    """Where not 0, Kafka and Postgres each keep their data on a file system of this size, which `disk_full` fills. Needs root."""
    proxies: dict[str, FaultProxy] = field(default_factory=dict)
    """By server: kafka, postgres, redis."""

    def environment(self, service: str | None) -> dict[str, str]:
        """The proxies' addresses, and a short session."""
        if service is None:
            return {}
        return {
            "TESSERA__POSTGRES__PORT": str(self.proxies["postgres"].port),
            "TESSERA__REDIS__URL": self.redis_url.replace(f":{self._running_redis().port}/", f":{self.proxies['redis'].port}/"),
            "TESSERA__KAFKA__SESSION_TIMEOUT_SECONDS": str(SESSION_SECONDS),
        }

    @contextmanager
    def disk_full(self, server: str) -> Iterator[None]:
        """Inside, the server's disk has no room. Raises RuntimeError where the stack has no disks of its own."""
        if not self.disks_megabytes:
            raise RuntimeError("the stack was started without disks")
        ballast = self.folder / server / "ballast"
        _fill(ballast)
        try:
            yield
        finally:
            ballast.unlink()

    def _provide_kafka(self) -> None:
        distribution = cached_distribution()
        distribution.ensure()
        ports = free_ports(("broker", "controller"))
        folder = self._disk("kafka")
        self.kafka = _FrontedKafka(folder, ports["broker"], ports["controller"], distribution, self.kafka_limits)
        self.kafka.proxy = self._front("kafka", ports["broker"])
        self._own(self.kafka)
        self.kafka_bootstrap_servers = self.kafka.bootstrap_servers

    def _provide_postgres(self) -> None:
        self.postgres = Postgres(self._disk("postgres"), free_ports(("postgres",))["postgres"], "only-for-tests", durable=self.durable)
        self._own(self.postgres)
        self.database_url = self.postgres.database_url
        self._front("postgres", urlsplit(self.database_url).port or 0)

    def _provide_redis(self) -> None:
        self.redis = Redis(self.folder / "redis", free_ports(("redis",))["redis"], "only-for-tests")
        self._own(self.redis)
        self.redis_url = self.redis.redis_url
        self._front("redis", self.redis.port)

    def servers(self) -> Sequence[Server]:
        """Everything that may be killed."""
        return [server for server in (self.kafka, self.postgres, self.redis) if server is not None]

    def _running_redis(self) -> Redis:
        if self.redis is None:
            raise RuntimeError("the stack was not started")
        return self.redis

    def _front(self, server: str, port: int) -> FaultProxy:
        proxy = FaultProxy(port)
        proxy.start()
        self._cleanup.callback(proxy.stop)
        self.proxies[server] = proxy
        return proxy

    def _disk(self, server: str) -> Path:
        folder = self.folder / server
        folder.mkdir()
        if self.disks_megabytes:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={self.disks_megabytes * _MEGABYTE},mode=755", "tmpfs", str(folder)]
            subprocess.run(mount, check=True)
            self._cleanup.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        return folder


def _fill(ballast: Path) -> None:
    """Takes all room but a little, also while the server takes some of it."""
    with ballast.open("wb") as file:
        for _ in range(_FILLINGS):
            state = os.statvfs(ballast.parent)
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - _SPARE_BYTES))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            else:
                return


@dataclass
class ClusterStack(BreakableStack):
    """Three brokers, of which one may be lost: every record is on all three, and acknowledged by two."""

    brokers: list[Kafka] = field(default_factory=list)

    def environment(self, service: str | None) -> dict[str, str]:
        """Topics are made with three replicas."""
        return {
            **super().environment(service),
            "TESSERA__KAFKA__REPLICATION_FACTOR": "3",
            "TESSERA__KAFKA__MINIMUM_IN_SYNC_REPLICAS": "2",
        }

    def servers(self) -> Sequence[Server]:
        """All brokers among them."""
        return [*self.brokers, *(server for server in super().servers() if server is not self.kafka)]

    def _provide_kafka(self) -> None:
        distribution = cached_distribution()
        distribution.ensure()
        ports = free_ports([f"{kind}{node}" for node in (1, 2, 3) for kind in ("broker", "controller")])
        voters = ",".join(f"{node}@{LOOPBACK}:{ports[f'controller{node}']}" for node in (1, 2, 3))
        cluster_id = base64.urlsafe_b64encode(b"t" + uuid.uuid4().bytes[1:]).rstrip(b"=").decode()
        for node in (1, 2, 3):
            folder = self.folder / f"kafka-{node}"
            member = _Member(folder, ports[f"broker{node}"], ports[f"controller{node}"], distribution, self.kafka_limits)
            member.proxy = self._front(f"kafka-{node}", member.port)
            member.node, member.voters, member.cluster_id = node, voters, cluster_id
            self.brokers.append(member)
            self._own(member)
        for broker in self.brokers:
            broker.wait_ready()
        self.kafka = self.brokers[0]
        self.kafka_bootstrap_servers = ",".join(member.bootstrap_servers for member in self.brokers)
