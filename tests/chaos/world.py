"""One platform on a stack that may be broken, and the scenes that are played on it."""

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from chaos.load import Load, Rates
from chaos.observing import rows
from chaos.oracle import Oracle

from tessera.local.environment import SERVICES
from tessera.local.processes import Server
from tessera.testkit import eventually_blocking
from tessera.testkit.breakable import BreakableStack, ClusterStack
from tessera.testkit.history import Findings
from tessera.testkit.platform import Platform

PATIENCE_SECONDS = 90.0
_USUAL = Rates()
_DISK_MEGABYTES = 1024
_QUIET = {
    "TESSERA_GATEWAY__PUBLISH_TIMEOUT_SECONDS": "2",
    "TESSERA_RETENTION__SWEEPS__LEASE_SECONDS": "3",
    "TESSERA_RETENTION__SWEEPS__ATTEMPTS": "50",
    "TESSERA_VALIDATOR__VALIDATIONS__LEASE_SECONDS": "4",
    "TESSERA_VALIDATOR__VALIDATIONS__ATTEMPTS": "50",
    "TESSERA_VALIDATOR__VALIDATIONS__PROLONG_SECONDS": "1",
    "TESSERA_GENERATOR__LEASE_SECONDS": "3",
    "TESSERA__DRAIN_SECONDS": "8",
    "TESSERA__KAFKA__REBALANCE_TIMEOUT_SECONDS": "12",
    "TESSERA__KAFKA__BATCH_RECORDS": "50",
    "TESSERA__TELEMETRY__TRACING": "false",
}
"""Short leases and rebalances: what died, or is stuck, is replaced within seconds instead of a minute. Small batches: those of a batch that
died are handled one by one. Many attempts of a job: here it is not the job's fault that its worker dies."""


@dataclass
class Scene:
    """A tenant of its own under load, and what is looked at afterwards."""

    platform: Platform
    tenant: str
    key: str
    load: Load
    oracle: Oracle
    expected_dead: set[str] = field(default_factory=set)
    """Ids of events that must end in the dead letters."""

    def warm(self, count: int = 5) -> None:
        """Wait until some events have had their effect. Blocks."""
        query = "SELECT 1 FROM memory.memory WHERE tenant_id = $1 LIMIT $2"
        eventually_blocking(lambda: len(rows(self.platform, query, self.tenant, count)) == count, PATIENCE_SECONDS)

    def applied(self) -> int:
        """How many events have had their effect."""
        return int(rows(self.platform, "SELECT count(*) FROM memory.memory WHERE tenant_id = $1", self.tenant)[0][0])

    def settle(self, bound_seconds: float) -> Findings:
        """End the load and look. Blocks, at most for twice the bound."""
        began = time.monotonic()
        self.load.stop(bound_seconds)
        return self.oracle.settled(self.load.ledger, max(5.0, bound_seconds - (time.monotonic() - began)), self.expected_dead)


@dataclass
class World:
    """Servers and services for many scenes."""

    seed: int
    disks: bool = False
    cluster: bool = False
    """Whether there are three brokers."""
    services: tuple[str, ...] = SERVICES
    settings: Mapping[str, str] = field(default_factory=dict)
    stack: BreakableStack = field(init=False)
    platform: Platform = field(init=False)
    _scenes: int = 0

    def start(self) -> None:
        """Blocks until everything is ready."""
        self.stack = ClusterStack() if self.cluster else BreakableStack(disks_megabytes=_DISK_MEGABYTES if self.disks else 0)
        self.stack.start()
        spool = {"TESSERA_GATEWAY__SPOOL__FOLDER": str(self.stack.folder / "spool")}
        self.platform = Platform(self.stack, services=self.services, settings={**_QUIET, **spool, **self.settings})
        try:
            self.platform.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Blocks until everything is gone."""
        try:
            for server in (*self.platform.processes.values(), *self.stack.servers()):
                server.kill()
        finally:
            self.stack.stop()

    @contextmanager
    def scene(self, name: str, rates: Rates = _USUAL) -> Iterator[Scene]:
        """A new tenant, its load begun and warm. The load has ended when the block is left."""
        self._scenes += 1
        tenant = f"{name.replace('_', '-')}-{self._scenes}"
        key = self.platform.tenant(tenant)
        eventually_blocking(lambda: rows(self.platform, "SELECT 1 FROM memory.tenant WHERE tenant_id = $1", tenant), PATIENCE_SECONDS)
        load = Load(self.platform, tenant, key, random.Random(f"{self.seed}:{tenant}"), rates)
        scene = Scene(self.platform, tenant, key, load, Oracle(self.platform, tenant))
        load.start()
        try:
            scene.warm()
            yield scene
        finally:
            load.stop(0)

    def server(self, name: str) -> Server:
        """kafka, postgres or redis."""
        found = {"kafka": self.stack.kafka, "postgres": self.stack.postgres, "redis": self.stack.redis}[name]
        assert found is not None, f"{name} was not started"
        return found

    def heal(self, services: Iterable[str] | None = None) -> None:
        """Start what does not run, and wait until all of it is ready. Blocks."""
        servers = self.stack.servers()
        for server in servers:
            if server.pid is None:
                server.start()
        for server in servers:
            server.wait_ready()
        for service in self.services if services is None else services:
            process = self.platform.processes[service]
            if process.pid is None:
                process.stop()
                process.start()
        self.platform.wait_ready(self.services if services is None else services)
