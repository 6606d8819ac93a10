"""What is measured: Tessera, and what it is held against, each started by itself on servers that all share."""

import contextlib
import hashlib
import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import uvloop
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from instruments import Upstream
from measuring import progress
from programs import Program, role

from tessera.local.folders import cache
from tessera.local.kafka import KafkaLimits
from tessera.local.ports import LOOPBACK, free_port
from tessera.local.processes import Server
from tessera.local.setup import uv_program
from tessera.testkit import Stack
from tessera.testkit.platform import Platform

MODELS = ("bench", "steady")
PARTITIONS = 4
_UNREACHED = "1000000000"
_LOCK = Path(__file__).with_name("litellm.lock")
_FLOOR_TABLES = (
    "CREATE TABLE job (id text PRIMARY KEY, request jsonb NOT NULL, ended timestamptz)",
    "CREATE TABLE remembered (id int PRIMARY KEY, content text NOT NULL)",
    "INSERT INTO remembered VALUES (1, 'The lamp in the hall is lit at dusk.')",
)


@dataclass(frozen=True)
class System:
    """Something that answers chats, and every process that it takes."""

    name: str
    url: str
    key: str = "none"
    processes: Mapping[str, int] = field(default_factory=dict)
    """Process ids by what they are; their children count with them."""
    own: tuple[str, ...] = ()
    """Which of them are its own code, and no server."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Version and configuration, where they are not this checkout's."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all."""
        return tuple(self.processes.values())

    def resident_megabytes(self) -> float:
        """Of its own processes and their children."""
        processes = [psutil.Process(self.processes[name]) for name in self.own]
        return sum(each.memory_info().rss for parent in processes for each in (parent, *parent.children(recursive=True))) / 2**20


@dataclass
class Ground:
    """Broker, Postgres, Redis and the fake provider of this run."""

    stack: Stack
    upstream: Upstream

    @property
    def direct(self) -> System:
        """Nothing between the load and the provider."""
        return System("direct", f"http://{self.upstream.address}/v1")

    @cached_property
    def servers(self) -> dict[str, int]:
        """Process ids by name."""
        found = {"broker": self.stack.kafka, "postgres": self.stack.postgres, "redis": self.stack.redis}
        return {name: server.pid for name, server in found.items() if server is not None and server.pid is not None}


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """Starts the servers; leaves nothing behind."""
    limits = KafkaLimits(heap_megabytes=1024, segment_bytes=2**28, retention_bytes=2**33, compiles_fully=True)
    stack = Stack(kafka_limits=limits, durable=True)
    stack.start()
    try:
        upstream = Upstream(stack.folder / "upstream", free_port())
        with _running(upstream):
            yield Ground(stack, upstream)
    finally:
        stack.stop()


@contextlib.contextmanager
def _running(*servers: Server) -> Iterator[None]:
    """All of them, until the block ends."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        yield
    finally:
        for server in servers:
            server.stop()


def _pids(programs: Mapping[str, Server]) -> dict[str, int]:
    return {name: program.pid for name, program in programs.items() if program.pid is not None}


@contextlib.contextmanager
def forwarder(at: Ground) -> Iterator[System]:
    """A bare ASGI application: no Kafka, no keys, nothing kept."""
    program = role(at.stack.folder, "forwarder", free_port(), {"BENCH_UPSTREAM": at.upstream.address})
    with _running(program):
        yield System("forwarder", f"http://{LOOPBACK}:{program.port}/v1", processes=_pids({"forwarder": program}), own=("forwarder",))


# --- the raw path ---------------------------------------------------------------------------------


@contextlib.contextmanager
def floor(at: Ground, *, through_memory: bool = False) -> Iterator[System]:
    """The same hops as Tessera's, by raw aiokafka: three, or four where memory is asked."""
    name = f"bench_{secrets.token_hex(4)}"
    database_url = uvloop.run(_floor_database(at, name))
    topics = {topic: f"{name}.{topic}" for topic in ("requested", "tokenized", "ready", "replies")}
    uvloop.run(_floor_topics(at, topics))
    environment = {
        "BENCH_UPSTREAM": at.upstream.address,
        "BENCH_BOOTSTRAP": at.stack.kafka_bootstrap_servers,
        "BENCH_DATABASE_URL": database_url,
        "BENCH_REQUESTED": topics["requested"],
        "BENCH_TOKENIZED": topics["tokenized" if through_memory else "ready"],
        "BENCH_READY": topics["ready"],
        "BENCH_REPLIES": topics["replies"],
    }
    steps = ("gateway", "tokenizer", "memory", "generator") if through_memory else ("gateway", "tokenizer", "generator")
    ports = {"gateway": free_port()}
    programs = {step: role(at.stack.folder / name, step, ports.get(step, 0), environment) for step in steps}
    with _running(*programs.values()):
        processes = {**_pids(programs), **{server: pid for server, pid in at.servers.items() if server != "redis"}}
        yield System("floor", f"http://{LOOPBACK}:{ports['gateway']}/v1", processes=processes, own=steps)


async def _floor_database(at: Ground, name: str) -> str:
    administrator = await asyncpg.connect(at.stack.database_url)
    await administrator.execute(f"CREATE DATABASE {name}")
    await administrator.close()
    database_url = at.stack.database_url.rpartition("/")[0] + f"/{name}"
    connection = await asyncpg.connect(database_url)
    for statement in _FLOOR_TABLES:
        await connection.execute(statement)
    await connection.close()
    return database_url


async def _floor_topics(at: Ground, topics: Mapping[str, str]) -> None:
    client = AIOKafkaAdminClient(bootstrap_servers=at.stack.kafka_bootstrap_servers)
    await client.start()
    try:
        await client.create_topics([NewTopic(topic, 1 if name == "replies" else PARTITIONS, 1) for name, topic in topics.items()])
    finally:
        await client.close()


# --- Tessera --------------------------------------------------------------------------------------


def _settings(at: Ground) -> dict[str, str]:
    """Limits count in Redis for every caller and are never reached; the provider's slots are not what is measured."""
    provider = {
        "name": "bench",
        "base_url": f"http://{at.upstream.address}/v1",
        "models": [{"id": model, "exact": True} for model in MODELS],
        "concurrency": 1_000,
    }
    counted = ("REQUESTS_PER_MINUTE", "TOKENS_PER_MINUTE", "CONCURRENT_STREAMS")
    return {
        "TESSERA_GENERATOR__PROVIDERS": json.dumps([provider]),
        "TESSERA_GENERATOR__TENANT_SHARE": "1",
        **{f"TESSERA_GATEWAY__LIMITS__{who}__{what}": _UNREACHED for who in ("IP", "KEY", "USER", "TENANT") for what in counted},
        "TESSERA__TELEMETRY__TRACING": "false",
        "TESSERA__TELEMETRY__LOG_LEVEL": "WARNING",
        # Each process is started as `make run` starts it, and not by fork as in tests: pages shared with a parent would hide growth.
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def tessera(at: Ground) -> Iterator[System]:
    """All six services, one process each, and a key of a tenant that is not the operator's."""
    platform = Platform(at.stack, settings=_settings(at))
    try:
        platform.start()
        services = _pids(platform.processes)
        key = platform.tenant("bench")
        yield System("tessera", f"{platform.url}/v1", key, {**services, **at.servers}, tuple(services))
    finally:
        platform.stop()


# --- LiteLLM --------------------------------------------------------------------------------------


class LiteLLM(Program):
    """The proxy, in an environment of its own."""

    def __init__(self, folder: Path, port: int, upstream: str, workers: int) -> None:
        self.workers = workers
        self.key = f"sk-{secrets.token_hex(16)}"
        self.configuration = {
            "model_list": [
                {
                    "model_name": model,
                    "litellm_params": {"model": f"openai/{model}", "api_base": f"http://{upstream}/v1", "api_key": "none"},
                }
                for model in MODELS
            ],
            "litellm_settings": {"set_verbose": False, "request_timeout": 600},
        }
        python = litellm_python()
        config = folder / "config.yaml"
        words = ("--config", str(config), "--host", LOOPBACK, "--port", str(port), "--num_workers", str(workers), "--telemetry", "False")
        environment = {
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it is fetched from the network at start
            "LITELLM_MASTER_KEY": self.key,
        }
        super().__init__(folder, port, (str(python), str(python.with_name("litellm")), *words), environment)
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(self.configuration))  # JSON is YAML

    def answers(self) -> bool:
        """Whether it says that it lives."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=2)
        try:
            connection.request("GET", "/health/liveliness")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def litellm_python() -> Path:
    """The interpreter of its environment, made from the lock once."""
    digest = hashlib.sha256(_LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = cache() / "bench" / f"litellm-{digest}"
    interpreter = folder / "bin" / "python"
    if not (folder / "complete").exists():
        progress("installing LiteLLM in an environment of its own (600 MB)")
        shutil.rmtree(folder, ignore_errors=True)
        uv, environment = uv_program(), {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        for command in (
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "sync", "--quiet", "--python", str(interpreter), "--require-hashes", str(_LOCK)],
        ):
            subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        (folder / "complete").touch()
    return interpreter


def litellm_version() -> str:
    """Of the installed distribution."""
    asking = "import importlib.metadata; print(importlib.metadata.version('litellm'))"
    return subprocess.run([str(litellm_python()), "-c", asking], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def litellm(at: Ground, workers: int) -> Iterator[System]:
    """Without a database, as it comes: nothing that it answers is kept."""
    proxy = LiteLLM(at.stack.folder / f"litellm-{workers}", free_port(), at.upstream.address, workers)
    about = {"version": litellm_version(), "workers": workers, "configuration": proxy.configuration}
    with _running(proxy):
        yield System("litellm", f"http://{LOOPBACK}:{proxy.port}/v1", proxy.key, _pids({"litellm": proxy}), ("litellm",), about)
