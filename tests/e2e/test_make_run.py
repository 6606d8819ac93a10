"""`make run` and its companions on the six real services: again, after a kill of anything, after a change, and down.

The tour has a test of its own. Every test begins with `run`, so they may come in any order.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest

from tessera.local.folders import cache
from tessera.local.kafka import Kafka, KafkaLimits, cached_distribution
from tessera.local.ports import free_ports, is_free
from tessera.local.postgres import Postgres
from tessera.local.processes import Server, recorded
from tessera.local.redis import Redis

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

Command = Callable[..., str]
_GIVEN = ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "REDIS_URL", "TESSERA_URL")


def _environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _GIVEN}
    ours = {"TESSERA_HOME": str(home), "TESSERA_LOCAL__TOUR": "false", "TESSERA_LOCAL__KAFKA_HEAP_MEGABYTES": "320"}
    fewer = {"TESSERA__KAFKA__KEYED_PARTITIONS": "4"}  # after each kill Kafka reads all again
    return {**kept, **ours, **fewer, "TESSERA_LOCAL__READY_SECONDS": "300", **settings}


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A state folder as a fresh checkout has it, but for the downloads."""
    cached_distribution().ensure()
    with tempfile.TemporaryDirectory(prefix="tessera-state-") as made:
        folder = Path(made)
        (folder / "cache").symlink_to(cache())
        yield folder
        _tessera_local(folder, "stop")


def _tessera_local(home: Path, *arguments: str, **settings: str) -> str:
    command = [sys.executable, "-m", "tessera.local.cli", *arguments]
    done = subprocess.run(command, env=_environment(home, settings), capture_output=True, text=True, check=False, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def command(home: Path) -> Command:
    """Runs one command of the platform, which is up and ready before the test."""
    _tessera_local(home, "run")

    def run(*arguments: str, **settings: str) -> str:
        return _tessera_local(home, *arguments, **settings)

    return run


def _processes(home: Path) -> dict[str, psutil.Process]:
    files = [home / "run" / "supervisord.json", *(home / "run").glob("ser*/*.json")]
    found = {file.stem: recorded(file) for file in files}
    return {name: process for name, process in found.items() if process is not None}


def _exports(command: Command) -> dict[str, str]:
    lines = command("env").splitlines()
    assert all(line.startswith("export ") for line in lines)
    return dict(line.removeprefix("export ").split("=", 1) for line in lines)


def _models(exports: Mapping[str, str]) -> httpx.Response:
    return httpx.get(f"{exports['TESSERA_URL']}/v1/models", headers={"Authorization": f"Bearer {exports['TESSERA_API_KEY']}"}, timeout=30)


def test_the_exports_connect_a_client(command: Command) -> None:
    answer = _models(_exports(command))
    assert answer.status_code == 200, answer.text
    assert "local/quote" in {model["id"] for model in answer.json()["data"]}


def test_a_second_run_reuses_everything(command: Command, home: Path) -> None:
    before = {name: process.pid for name, process in _processes(home).items()}
    started = time.monotonic()
    told = command("run")
    assert "Ready after" in told
    assert "migrations" not in told
    assert {name: process.pid for name, process in _processes(home).items()} == before
    assert time.monotonic() - started < 60
    assert len(before) == 11


@pytest.mark.parametrize(
    "victims", [("supervisord",), ("kafka", "memory", "postgres", "gateway-1"), ("supervisord", "kafka", "postgres", "redis")]
)
def test_it_recovers_from_kills(command: Command, home: Path, victims: tuple[str, ...]) -> None:
    key = _exports(command)["TESSERA_API_KEY"]
    before = _processes(home)
    for name in victims:
        before[name].kill()
    psutil.wait_procs([before[name] for name in victims], 10)
    command("run")
    after = _processes(home)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in victims)
    exports = _exports(command)
    assert exports["TESSERA_API_KEY"] == key
    assert _models(exports).status_code == 200


def test_a_changed_setting_restarts_only_its_service(command: Command, home: Path) -> None:
    before = _processes(home)
    command("run", TESSERA_RETENTION__DRAIN_SECONDS="19")
    changed = [name for name, process in _processes(home).items() if process != before[name]]
    assert changed == ["retention"]


def test_stop_leaves_no_process_and_no_port_and_one_that_somebody_takes_then_is_given_up(command: Command, home: Path) -> None:
    processes = _processes(home)
    command("stop")
    assert psutil.wait_procs(list(processes.values()), 5)[1] == []
    remembered = json.loads((home / "ports.json").read_text())
    assert [name for name, port in remembered.items() if not is_free(port)] == []
    taker = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(remembered["kafka"]), "--bind", "127.0.0.1"], stderr=subprocess.DEVNULL
    )
    try:
        command("run")
        assert json.loads((home / "ports.json").read_text())["kafka"] != remembered["kafka"]
        assert _processes(home).keys() == processes.keys()
    finally:
        taker.kill()
        taker.wait()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[dict[str, Server]]:
    """A Kafka, a Postgres and a Redis that are none of ours, by the variable that gives their address."""
    ports = free_ports(("kafka", "controller", "postgres", "redis"))
    distribution, limits = cached_distribution(), KafkaLimits(heap_megabytes=256)
    servers: dict[str, Server] = {
        "KAFKA_BOOTSTRAP_SERVERS": Kafka(tmp_path / "kafka", ports["kafka"], ports["controller"], distribution, limits),
        "DATABASE_URL": Postgres(tmp_path / "postgres", ports["postgres"], "password", durable=False),
        "REDIS_URL": Redis(tmp_path / "redis", ports["redis"], "password"),
    }
    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait_ready()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def test_servers_that_are_there_already_are_used_and_left_alone(elsewhere: dict[str, Server], tmp_path: Path) -> None:
    state = tmp_path / "state"
    addresses = {
        "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{elsewhere['KAFKA_BOOTSTRAP_SERVERS'].port}",
        "DATABASE_URL": f"postgresql://postgres:password@127.0.0.1:{elsewhere['DATABASE_URL'].port}/postgres",  # pragma: allowlist secret
        "REDIS_URL": f"redis://:password@127.0.0.1:{elsewhere['REDIS_URL'].port}/0",
    }
    try:
        told = _tessera_local(state, "run", **addresses)
        assert [name for name in addresses if f"{name} is given: using it" in told] == list(addresses)
        assert _processes(state).keys().isdisjoint({"kafka", "postgres", "redis"})
        states = {line.split()[0]: line.split()[1:3] for line in _tessera_local(state, "status", **addresses).splitlines()}
        assert all(states[name] == ["GIVEN", "answers"] for name in ("kafka", "postgres", "redis"))
        exports = _exports(lambda *words: _tessera_local(state, *words, **addresses))
        assert exports["KAFKA_BOOTSTRAP_SERVERS"] == addresses["KAFKA_BOOTSTRAP_SERVERS"]
        assert _models(exports).status_code == 200
    finally:
        _tessera_local(state, "stop", **addresses)
    assert all(server.answers() for server in elsewhere.values())
