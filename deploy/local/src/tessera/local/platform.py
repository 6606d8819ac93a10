"""`make run` and its companions: bring the platform of one checkout up, look at it, take it down.

Every function may be called at any time, also after a crash of anything: what runs is asked of supervisord and of process records,
and what is missing is made. Nothing here is a daemon; supervisord is.
"""

import fcntl
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tessera.local.console import say, step
from tessera.local.credentials import Credentials
from tessera.local.environment import SERVICES, given_addresses, hosts
from tessera.local.errors import LocalError, NotReadyError
from tessera.local.files import replace_text
from tessera.local.folders import CHECKOUT
from tessera.local.kafka import cached_distribution
from tessera.local.plan import Instance, Plan, digest, port_names
from tessera.local.ports import LOOPBACK, accepts_connections, remembered_ports
from tessera.local.postgres import postgres_problem
from tessera.local.processes import last_lines, wait_until
from tessera.local.redis import redis_problem
from tessera.local.settings import LocalSettings
from tessera.local.supervision import Supervisor

NOT_RUNNING = "Tessera is not running: `make run` starts it."
_FATAL = ("FATAL", "UNKNOWN")
_LIVES = 4
"""A process that supervisord had to start again so often while we waited will not come up."""
_PROBE_SECONDS = 2
_SERVER_OF = {"KAFKA_BOOTSTRAP_SERVERS": "kafka", "DATABASE_URL": "postgres", "REDIS_URL": "redis"}


class Platform:
    """The platform of one state folder. Make it under `exclusive`, unless it is only looked at (`choose_ports=False`)."""

    def __init__(self, folder: Path, settings: LocalSettings, *, choose_ports: bool) -> None:
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)
        self.plan, self.supervisor = self._planned(choose_ports)

    @property
    def is_running(self) -> bool:
        """Whether a supervisord of ours lives."""
        return self.supervisor.is_running()

    def up(self) -> None:
        """Bring everything up and wait until it is ready. Raises LocalError with what is wrong."""
        self._check_given()
        self._start_servers()
        changed = self._changed()
        self.supervisor.stop_programs(instance.name for instance in changed)
        self._prepare_data()
        self._start_services()

    def down(self) -> None:
        """Stop everything of ours."""
        self.supervisor.shutdown()

    def report(self) -> Iterator[str]:
        """One line for each process."""
        states = self.supervisor.states()
        listens = {server.name: f"{LOOPBACK}:{server.port}" for server in self.plan.servers}
        admin = {instance.name: instance.admin_port for instance in self.plan.instances}
        for name in (*listens, *admin):
            state = states.get(name, {})
            ready = _health(admin[name]) if name in admin else "answers" if accepts_connections(listens[name]) else "silent"
            where = listens.get(name) or f"{LOOPBACK}:{admin[name]} (admin)"
            yield f"  {name:<11} {state.get('statename', 'STOPPED'):<9} {ready:<13} {where:<24} {state.get('description', '')}".rstrip()
        for variable, address in self.plan.given.items():
            ready = "answers" if any(map(accepts_connections, hosts(address))) else "silent"
            yield f"  {_SERVER_OF[variable]:<11} {'GIVEN':<9} {ready:<13} {', '.join(hosts(address)):<24} {variable}"

    def is_ready(self) -> bool:
        """Whether every service says that it can work."""
        return self.is_running and all(_is_ready(instance.admin_port) for instance in self.plan.instances)

    def _planned(self, choose_ports: bool) -> tuple[Plan, Supervisor]:
        """Ports stay as remembered, except those that somebody else has taken while our program was down."""
        file = self.folder / "ports.json"
        known: Mapping[str, int] = json.loads(file.read_text()) if file.exists() else {}
        names = port_names(self.settings)
        if not choose_ports and not known.keys() >= set(names):
            raise LocalError(NOT_RUNNING)
        password = Credentials(self.folder / "secrets.json")["supervisor"]
        before = Supervisor(self.folder, known.get("supervisor", 0), password, self.settings.log_bytes)
        # A given server that is away must not find its port taken by ours, which would then pass for it.
        ports = remembered_ports(file, names, _held(before.states()), _ports_of(given_addresses(known))) if choose_ports else known
        plan = Plan(self.folder, self.settings, ports, given_addresses(ports))
        return plan, Supervisor(self.folder, ports["supervisor"], password, self.settings.log_bytes)

    def _check_given(self) -> None:
        self._refuse_another_platforms()
        # Kafka last: it is asked with all that the services are told, among it the other two addresses.
        probes: dict[str, Callable[[str], str | None]] = {
            "DATABASE_URL": postgres_problem,
            "REDIS_URL": redis_problem,
            "KAFKA_BOOTSTRAP_SERVERS": self._kafka_problem,
        }
        for name, probe in probes.items():
            if name not in self.plan.given:
                continue
            if problem := probe(self.plan.given[name]):
                wanted = "Correct it, or remove it from the environment or `.env` to have one started."
                raise LocalError(f"{name} is set, but nothing that can be used answers there. {wanted}\n  {problem}")
            say(f"  {name} is given: using it, starting none")

    def _refuse_another_platforms(self) -> None:
        """A shell that connected to another checkout has its addresses: using them would give that platform's database new passwords."""
        url = os.environ.get("TESSERA_URL", "").rstrip("/")
        exported = [name for name in self.plan.given if os.environ.get(name) == self.plan.given[name]]
        if url and url != self.plan.url and exported:
            raise LocalError(
                f"{', '.join(exported)} in this shell came with {url} from `make env`, of another checkout or from before `make clean`. "
                f"To run this one: unset TESSERA_URL TESSERA_API_KEY {' '.join(exported)}"
            )

    def _kafka_problem(self, address: str) -> str | None:
        """Asked as the services will ask: with TLS and a log-in where `TESSERA__KAFKA__…` says so."""
        told = {**self.plan.operator_environment(), "TESSERA__KAFKA__BOOTSTRAP_SERVERS": address}
        try:
            _run_in_turn(told, ["tessera.bus.reachable"])
        except LocalError as error:
            return str(error).partition("\n")[2].strip().replace("\n", "\n  ")
        return None

    def _start_servers(self) -> None:
        if not self.supervisor.is_running():
            self.supervisor.end_orphans()
        distribution = cached_distribution()
        if "KAFKA_BOOTSTRAP_SERVERS" not in self.plan.given and not distribution.is_complete():
            with step("Kafka's class data archive" if distribution.jars.exists() else "fetching Kafka"):
                distribution.ensure()
        for server in self.plan.servers:
            server.prepare()
        self.supervisor.start(self.plan.programs())
        self.supervisor.ensure_started(server.name for server in self.plan.servers)
        deadline = time.monotonic() + self.settings.ready_seconds
        for server in self.plan.servers:
            with step(server.name):
                self._wait(server.name, server.answers, deadline)

    def _prepare_data(self) -> None:
        """Database, roles, migrations and topics, unless nothing of them changed since they were last made."""
        stamp = self.folder / "run" / "prepared"
        operator = self.plan.operator_environment()  # makes the passwords that are missing, whose age is part of the fingerprint
        wanted = self._data_fingerprint()
        if not self.plan.given and stamp.exists() and stamp.read_text() == wanted:
            return
        stamp.unlink(missing_ok=True)
        with step("database, migrations and topics"), ThreadPoolExecutor(2) as both:
            database = both.submit(_run_in_turn, operator, ["tessera.storage.bootstrap", *SERVICES], ["tessera.storage.migrate", *SERVICES])
            topics = both.submit(_run_in_turn, operator, ["tessera.bus.make_topics"])
            database.result()
            topics.result()
        replace_text(stamp, wanted)

    def _data_fingerprint(self) -> str:
        """Changes with migrations, topics, passwords, and when a data folder was made anew."""
        code = [CHECKOUT / "libs" / name / "src" for name in ("contracts", "storage", "bus")]
        migrations = [CHECKOUT / "services" / service / "migrations" for service in SERVICES]
        made = [self.folder / "kafka" / "data" / "meta.properties", self.folder / "postgres" / "data" / "PG_VERSION"]
        ages = [str(file.stat().st_ctime_ns) if file.exists() else "" for file in (*made, self.folder / "secrets.json")]
        return digest([*code, *migrations], json.dumps(ages))

    def _changed(self) -> list[Instance]:
        """Running services whose code, packages or variables are not those that they were started with."""
        started = self._started()
        return [instance for instance in self.plan.instances if started.get(instance.name) != self.plan.fingerprint(instance)]

    def _start_services(self) -> None:
        fingerprints = {instance.name: self.plan.fingerprint(instance) for instance in self.plan.instances}
        self.supervisor.ensure_started(fingerprints)
        replace_text(self._started_file, json.dumps(fingerprints, indent=2))
        deadline = time.monotonic() + self.settings.ready_seconds
        for instance in self.plan.instances:
            with step(instance.name):
                self._wait(instance.name, partial(_is_ready, instance.admin_port), deadline)

    @property
    def _started_file(self) -> Path:
        return self.folder / "run" / "started.json"

    def _started(self) -> Mapping[str, str]:
        return json.loads(self._started_file.read_text()) if self._started_file.exists() else {}

    def _wait(self, name: str, is_ready: Callable[[], bool], deadline: float) -> None:
        lives: set[int] = set()

        def settled() -> bool:
            state = self.supervisor.states()[name]
            lives.add(state["pid"])
            if state["statename"] in _FATAL or len(lives - {0}) > _LIVES:
                raise NotReadyError(f"{name} does not stay up.")
            return is_ready()

        try:
            wait_until(settled, deadline, f"{name} did not become ready")
        except NotReadyError as problem:
            raise NotReadyError(f"{problem} The end of its log:\n{last_lines(self.folder / 'logs' / f'{name}.log')}") from None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One command at a time changes what runs; a second one waits and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "command.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another command is at work in this checkout; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run_in_turn(variables: Mapping[str, str], *modules: Sequence[str]) -> None:
    for module in modules:
        command = [sys.executable, "-m", *module]
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise LocalError(f"{module[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _ports_of(given: Mapping[str, str]) -> list[int]:
    ports = (host.rpartition(":")[2] for address in given.values() for host in hosts(address))
    return [int(port) for port in ports if port.isdecimal()]


def _held(states: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the ports that our own live programs hold."""
    live = {name for name, state in states.items() if state["pid"]}
    extra = {"kafka": "controller"} | {name: "gateway" for name in live if name.startswith("gateway-")}
    return [*live, *(extra[name] for name in live if name in extra), *(["supervisor"] if states else [])]


def _is_ready(admin_port: int) -> bool:
    return _health(admin_port) == "ready"


def _health(admin_port: int) -> str:
    """`ready`, `not ready`, or `silent` when nothing answers."""
    connection = http.client.HTTPConnection(LOOPBACK, admin_port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/health/ready")
        return "ready" if connection.getresponse().status == http.client.OK else "not ready"
    except (OSError, http.client.HTTPException):
        return "silent"
    finally:
        connection.close()
