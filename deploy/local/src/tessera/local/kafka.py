"""Apache Kafka from its Maven artefacts: one node, broker and controller in one process, no Docker.

Jars and a class data archive are fetched and built once into the cache (about 46 MB and 50 MB); the archive halves the start.
"""

import asyncio
import base64
import hashlib
import json
import os
import signal
import ssl
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from tessera.local.certificates import Authority
from tessera.local.errors import LocalError
from tessera.local.files import locked, replace_text
from tessera.local.folders import RECIPES, cache
from tessera.local.ports import LOOPBACK, accepts_connections, free_ports
from tessera.local.processes import Command, Server, run_apart
from tessera.local.tools import ALTERNATIVE, KAFKA_VERSION, java, java_version, maven

_MAVEN_TIMEOUT_SECONDS = 600
_USERS = "users.arguments"
_ARCHIVING_SECONDS = 120  # the archive is written on the way out, and a kill would lose it
_QUIETLY = ("-Xshare:auto", "-Xlog:cds=off", "-Xlog:cds+dynamic=off")
_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers={host}:{controller_port}
log.dirs=data
auto.create.topics.enable=false
num.partitions=1
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=16777216
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
log.segment.bytes={segment_bytes}
log.retention.bytes={retention_bytes}
log.index.size.max.bytes=1048576
metadata.log.max.record.bytes.between.snapshots=4194304
metadata.max.retention.bytes=33554432
metadata.log.segment.bytes=8388608
"""
_PLAIN = """\
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
"""
_SECURED = """\
listeners=SCRAM://{host}:{port},MUTUAL://{host}:{mutual_port},CONTROLLER://{host}:{controller_port}
advertised.listeners=SCRAM://{host}:{port},MUTUAL://{host}:{mutual_port}
listener.security.protocol.map=SCRAM:SASL_SSL,MUTUAL:SSL,CONTROLLER:SASL_SSL
inter.broker.listener.name=SCRAM
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
sasl.mechanism.controller.protocol=PLAIN
listener.name.scram.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.scram.scram-sha-512.sasl.jaas.config={scram} required username="admin" password="{password}";
listener.name.controller.sasl.enabled.mechanisms=PLAIN
listener.name.controller.plain.sasl.jaas.config={plain} required username="admin" password="{password}" user_admin="{password}";
listener.name.mutual.ssl.client.auth=required
listener.name.mutual.ssl.principal.mapping.rules=RULE:^.*CN=([^,]+).*$/$1/
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
ssl.truststore.type=PEM
ssl.truststore.location={truststore}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:admin
allow.everyone.if.no.acl.found=false
"""
_MODULES = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class KafkaSecurity:
    """A node that speaks only TLS: `bootstrap_servers` with SCRAM-SHA-512, `mutual_bootstrap_servers` with client certificates.

    The principal is the user, or the common name of the certificate's subject. Nobody but the super user `admin` may do anything until
    access control lists say so.
    """

    authority: Authority
    """Must have been created. Issues the node's certificate; its clients' are believed."""
    passwords: Mapping[str, str]
    """Of the users made when the data folder is formatted, among them `admin`."""
    mutual_port: int

    def administrator(self) -> dict[str, Any]:
        """What a client of aiokafka needs to log in as the super user."""
        return {
            "security_protocol": "SASL_SSL",
            "ssl_context": ssl.create_default_context(cafile=self.authority.ca_file),
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": "admin",
            "sasl_plain_password": self.passwords["admin"],
        }


@dataclass(frozen=True)
class KafkaLimits:
    """Caps of one node."""

    heap_megabytes: int = 512
    segment_bytes: int = 16 * 2**20
    """A segment is the unit of deletion: small ones keep the disk close to the cap."""
    retention_bytes: int = 64 * 2**20
    """Per partition, for topics that set no cap of their own."""
    compiles_fully: bool = False
    """Java compiles as far as it can, as a broker in production does: it works less once it is warm, and starts later."""


@dataclass(frozen=True)
class KafkaDistribution:
    """The jars and the class data archive in the cache."""

    folder: Path

    @property
    def jars(self) -> Path:
        """Folder of the jars; complete when it exists, because it is renamed into place."""
        return self.folder / "jars"

    @property
    def archive(self) -> Path:
        """Class data archive of these jars, where they lie, for this Java; a missing one only slows the start.

        Java refuses, without a word, an archive that another build wrote or whose jars have moved or been written again: such a one has
        another name, so that it is seen to be missing. Raises MissingToolError.
        """
        seen = [(str(jar), int((state := jar.stat()).st_mtime), state.st_size) for jar in self._class_path()]
        key = hashlib.sha256(json.dumps([java_version(java()), seen]).encode()).hexdigest()[:16]
        return self.folder / f"kafka-{key}.jsa"

    @property
    def class_path(self) -> str:
        """The jars in sorted order: with a wildcard the archive is refused."""
        return os.pathsep.join(map(str, self._class_path()))

    def java(self, *arguments: str, heap_megabytes: int = 256, compiles_fully: bool = False) -> list[str]:
        """A Java command on these jars, one that starts fast rather than peaks high unless it `compiles_fully`."""
        memory = [f"-Xms{heap_megabytes}m", f"-Xmx{heap_megabytes}m", *([] if compiles_fully else ["-XX:TieredStopAtLevel=1"])]
        logging = [f"-Dlog4j2.configurationFile={RECIPES / 'kafka' / 'log4j2.properties'}"]
        return [java(), *memory, *logging, *arguments[:-1], "-cp", self.class_path, *arguments[-1].split()]

    def is_complete(self) -> bool:
        """Whether nothing is left to fetch or build."""
        return self.jars.exists() and self.archive.exists()

    def ensure(self) -> None:
        """Fetch and build what is missing: one process at a time, others wait. Raises MissingToolError, LocalError. Blocks."""
        if self.is_complete():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "build.lock"):
            if not self.jars.exists():
                self._fetch()
            if not self.archive.exists():
                self._build_archive()

    def _fetch(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="fetching-") as scratch:
            target = Path(scratch) / "jars"
            command = [
                maven(),
                "-q",
                "-B",
                "-f",
                str(RECIPES / "kafka" / "pom.xml"),
                "dependency:copy-dependencies",
                f"-DoutputDirectory={target}",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_MAVEN_TIMEOUT_SECONDS)
            if done.returncode != 0:
                raise LocalError(f"Maven could not fetch Kafka {KAFKA_VERSION}. {ALTERNATIVE}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            target.rename(self.jars)

    def _class_path(self) -> list[Path]:
        """By their real paths: the archive knows the jars by name, also where the cache is reached by a link."""
        return sorted(self.jars.resolve().glob("*.jar"))

    def _build_archive(self) -> None:
        """Replaces those that are of no use any more; a broker that still runs on one keeps it open."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="archiving-") as scratch:
            written = Path(scratch) / "kafka.jsa"
            self._write_archive(written)
            if written.exists():
                for stale in self.folder.glob("kafka*.jsa"):
                    stale.unlink()
                written.rename(self.archive)

    def _write_archive(self, file: Path) -> None:
        """Run a broker once and let it write down the classes that it loaded."""
        ports = free_ports(("kafka", "controller"))
        broker = Kafka(file.parent / "node", ports["kafka"], ports["controller"], self, archiving_to=file)
        try:
            broker.start()
            broker.wait_ready()
        finally:
            broker.stop()


def cached_distribution() -> KafkaDistribution:
    """The distribution in the cache of this checkout; `ensure` completes it."""
    return KafkaDistribution(cache() / f"kafka-{KAFKA_VERSION}")


class Kafka(Server):
    """One node. Bootstrap address: `bootstrap_servers`."""

    name: ClassVar[str] = "kafka"

    def __init__(
        self,
        folder: Path,
        port: int,
        controller_port: int,
        distribution: KafkaDistribution,
        limits: KafkaLimits = KafkaLimits(),
        *,
        security: KafkaSecurity | None = None,
        record: Path | None = None,
        archiving_to: Path | None = None,
    ) -> None:
        super().__init__(folder, port)
        self._controller_port = controller_port
        self._distribution = distribution
        self._limits = limits
        self._security = security
        self._record = record
        self._archiving_to = archiving_to
        if archiving_to is not None:
            self.grace_seconds = _ARCHIVING_SECONDS

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def mutual_bootstrap_servers(self) -> str:
        """Address for clients with certificates. Raises RuntimeError on a node without security."""
        if self._security is None:
            raise RuntimeError("this node has no listener for client certificates")
        return f"{LOOPBACK}:{self._security.mutual_port}"

    def prepare(self) -> None:
        """Write the configuration and format the data folder once. Raises LocalError with what the format tool said."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._security is not None:
            self._write_keystore(self._security)
        replace_text(self._properties, self._configuration(), mode=0o600 if self._security else 0o644)
        if not (self.folder / "data" / "meta.properties").exists():
            self._format()

    def _format(self) -> None:
        tool = f"kafka.tools.StorageTool format -t {_cluster_id()} -c server.properties --standalone -g{self._users()}"
        done = subprocess.run(self._distribution.java(*self._sharing(), tool), cwd=self.folder, capture_output=True, text=True, check=False)
        (self.folder / _USERS).unlink(missing_ok=True)
        if done.returncode != 0:
            raise LocalError(f"Kafka's data folder could not be formatted:\n{done.stdout}{done.stderr}")

    def _write_keystore(self, security: KafkaSecurity) -> None:
        made = security.authority.issue("broker")
        replace_text(self.folder / "keystore.pem", made.key_file.read_text() + made.certificate_file.read_text(), mode=0o600)

    def _users(self) -> str:
        """Passwords travel in a file, never in arguments."""
        if self._security is None:
            return ""
        users = [f"--add-scram\nSCRAM-SHA-512=[name={name},password={word}]\n" for name, word in self._security.passwords.items()]
        replace_text(self.folder / _USERS, "".join(users), mode=0o600)
        return f" @{_USERS}"

    def command(self) -> Command:
        """Java on the cached jars; relative paths resolve from the node's folder."""
        share = [f"-XX:ArchiveClassesAtExit={self._archiving_to}", *_QUIETLY] if self._archiving_to else self._sharing()
        broker, limits = "kafka.Kafka server.properties", self._limits
        java = self._distribution.java(*share, broker, heap_megabytes=limits.heap_megabytes, compiles_fully=limits.compiles_fully)
        return Command(
            program=tuple(java),
            cwd=self.folder,
            stop_signal=signal.SIGTERM,
            lock=self.folder / "node.lock",
            ports=(self.port, self._controller_port, *([self._security.mutual_port] if self._security else [])),
            record=self._record,
        )

    def _sharing(self) -> list[str]:
        """Options for a start with the class data archive, where there is one."""
        return [f"-XX:SharedArchiveFile={self._distribution.archive}", *_QUIETLY]

    def answers(self) -> bool:
        """Whether a client gets metadata that names a broker."""
        return kafka_answers(self.bootstrap_servers, **(self._security.administrator() if self._security else {}))

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _configuration(self) -> str:
        listeners = _PLAIN if self._security is None else _SECURED
        return (_PROPERTIES + listeners).format(
            host=LOOPBACK,
            port=self.port,
            controller_port=self._controller_port,
            segment_bytes=self._limits.segment_bytes,
            retention_bytes=self._limits.retention_bytes,
            **(_secured_values(self._security) if self._security else {}),
        )


def _secured_values(security: KafkaSecurity) -> dict[str, object]:
    return {
        "mutual_port": security.mutual_port,
        "password": security.passwords["admin"],
        "scram": f"{_MODULES}.scram.ScramLoginModule",
        "plain": f"{_MODULES}.plain.PlainLoginModule",
        "keystore": "keystore.pem",
        "truststore": security.authority.ca_file,
    }


def kafka_answers(bootstrap_servers: str, timeout_seconds: float = 5, **connection: Any) -> bool:
    """Whether a Kafka at this address gives metadata; `connection` is for aiokafka's client. Blocks, at most for the time-out."""

    async def ask() -> None:
        options = {"bootstrap_servers": bootstrap_servers, "request_timeout_ms": int(timeout_seconds * 1000)}
        client = AIOKafkaConsumer(**options, **connection)
        try:
            await asyncio.wait_for(client.start(), timeout_seconds)
            await client.topics()
        finally:
            await client.stop()

    if not any(accepts_connections(address) for address in bootstrap_servers.split(",")):
        return False
    try:
        run_apart(ask())
    except (KafkaError, TimeoutError, OSError):
        return False
    return True


def _cluster_id() -> str:
    """A random id in Kafka's form; one that starts with a dash would be read as an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        if not text.startswith("-"):
            return text
