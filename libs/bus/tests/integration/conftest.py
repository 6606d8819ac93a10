"""A bus inside the test, and the probe service as a process of its own."""

import asyncio
import gc
import importlib.util
import os
import signal
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tessera.bus import Bus
from tessera.contracts.errors import FatalError
from tessera.storage import Database
from tessera.testkit import CloudEventProducer, CloudEventReader

PROBE = Path(__file__).parent / "probe.py"


@pytest.fixture(scope="session")
def probe() -> ModuleType:
    """The module, for tests that run its handlers inside."""
    spec = importlib.util.spec_from_file_location("tessera_bus_probe", PROBE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RunningBus:
    """A bus with the probe's handlers, and what it said was fatal."""

    def __init__(self, bus: Bus, fatal: list[FatalError]) -> None:
        self.bus = bus
        self.fatal = fatal

    async def start(self) -> None:
        await self.bus.connect()
        await self.bus.start()

    async def stop(self) -> None:
        await self.bus.drain()
        await self.bus.stop()


@pytest.fixture
def new_bus(ground: Any, probe: ModuleType, database: Database) -> Callable[..., RunningBus]:
    """Makes a bus; the caller starts and stops it."""

    def make(instance: str = "one", register: Callable[[Bus], None] | None = None, **options: Any) -> RunningBus:
        settings = probe.ProbeSettings(**{"instance": instance, "kafka": ground.kafka, "postgres": ground.postgres, **options})
        fatal: list[FatalError] = []
        bus = Bus(settings, database, on_fatal=fatal.append)
        (register or probe.register)(bus)
        return RunningBus(bus, fatal)

    return make


@pytest.fixture
def running(new_bus: Callable[..., RunningBus]) -> Callable[..., Any]:
    """An async context manager around a started bus."""

    @asynccontextmanager
    async def run(*arguments: Any, **options: Any) -> AsyncIterator[RunningBus]:
        made = new_bus(*arguments, **options)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()

    return run


@pytest.fixture
def producer(ground: Any) -> CloudEventProducer:
    """A stranger that publishes."""
    return CloudEventProducer(ground.kafka.bootstrap_servers, ground.kafka.topic_prefix)


@pytest.fixture
async def reader(ground: Any) -> AsyncIterator[Callable[..., CloudEventReader]]:
    """Makes readers of whole topics."""
    made: list[CloudEventReader] = []

    def make(*topics: str) -> CloudEventReader:
        made.append(CloudEventReader(ground.kafka.bootstrap_servers, *topics, topic_prefix=ground.kafka.topic_prefix))
        return made[-1]

    yield make
    for opened in made:
        await opened.close()


class ProbeProcess:
    """The probe service in a process that may be killed."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment = environment
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **more: str) -> None:
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, str(PROBE), env={**os.environ, **self._environment, **more}, stdout=output, stderr=output
            )

    async def ended(self, within: timedelta = timedelta(seconds=20)) -> int:
        """The exit code: negative for a signal."""
        assert self._process is not None
        async with asyncio.timeout(within.total_seconds()):
            return await self._process.wait()

    def tell(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def log(self) -> str:
        return self._log.read_text()

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@pytest.fixture
async def new_process(ground: Any, tmp_path: Path) -> AsyncIterator[Callable[[str], ProbeProcess]]:
    """Makes probes as processes; killed at the end of the test."""
    made: list[ProbeProcess] = []

    def make(name: str) -> ProbeProcess:
        made.append(ProbeProcess(ground.environment(), tmp_path / f"{name}.log"))
        return made[-1]

    yield make
    for process in made:
        await process.stop()


@pytest.fixture
def process(new_process: Callable[[str], ProbeProcess]) -> ProbeProcess:
    """The probe as a process of its own."""
    return new_process("probe")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where a broker is frozen, a client of aiokafka sometimes keeps a connection open after its stop. Traced so far: the connection was
    made by the fetcher's request for offsets; probably that was still connecting while the client closed. Modules that say
    BROKER_FREEZES clear it away at once, when nothing holds it any more: its warning would fail whichever test runs when it is collected.
    """
    outcome = yield
    if getattr(getattr(item, "module", None), "BROKER_FREEZES", False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    return outcome
