"""Runs a service: settings, telemetry, admin port, bus, workers, HTTP, signals, and a stop that drains before it leaves."""

from __future__ import annotations

import asyncio
import gc
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, Final, Generic, TypeVar

import uvloop

from tessera.bus import faults
from tessera.bus.bus import Bus
from tessera.bus.http import HttpServer
from tessera.bus.partitions import BACKOFF, PASSING
from tessera.bus.reloading import Prepare, Reloader, Swap, explained, follow_file
from tessera.bus.settings import ServiceSettings, settings_file
from tessera.bus.status import ControlListener, StatusReporter
from tessera.contracts.errors import FatalError
from tessera.resilience import Breaker
from tessera.storage import Database
from tessera.storage.tls import fingerprint
from tessera.telemetry import Health, configure, get_logger, listening_socket, serve_admin, set_log_level, shutdown

S = TypeVar("S", bound=ServiceSettings)
Work = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
Check = Callable[[], Awaitable[None]]
Build = Callable[["Runtime[S]"], Awaitable[None]]

EXIT_FATAL: Final = 1
EXIT_SETTINGS: Final = 2
_JOINING, _STATUS, _SETTINGS = "bus", "status", "settings"
_SETTLE: Final = timedelta(seconds=5)
"""Beyond the drain deadline: for disconnecting."""

_OPENING: Final = timedelta(seconds=5)
"""Longest wait of a replica that also serves without Kafka."""
_LOOK_AGAIN: Final = timedelta(milliseconds=50)

_GARBAGE_THRESHOLDS: Final = (50_000, 20, 100)
"""Python's own (700, 10, 10) look at every record in the queues again and again: up to half of the time of building events."""

_log = get_logger(__name__)


def run_service(settings_class: type[S], build: Build[S]) -> None:
    """Runs a service until SIGTERM or SIGINT and ends the process: 0 after a drain, 1 after a fatal error, 2 for wrong settings."""
    gc.freeze()  # modules stay: to look at them twice until the service is ready would take a quarter of a second
    gc.enable()  # whoever started this may have left it off for the imports
    try:
        settings = settings_class()
    except ValueError as error:
        sys.stderr.write(explained(settings_class, error))
        sys.exit(EXIT_SETTINGS)
    configure(settings.service, settings.instance, settings.telemetry)
    faults.arm(settings.crash_point if settings.profile == "test" else None)
    try:
        code = uvloop.run(Runtime(settings).run(build))
    finally:
        shutdown()
    sys.exit(code)


class Runtime(Generic[S]):
    """What `build` gets: the place to add dependencies, workers and servers. One per process."""

    def __init__(self, settings: S) -> None:
        self._reloader = Reloader(settings)
        self._reloader.follow(_log_level)
        self._file_seen = [(file, fingerprint(file)) for file in settings_file()]
        self.health = Health(settings.service, settings.instance)
        self.database = Database(settings.service, settings.postgres)
        self.bus = Bus(settings, self.database, on_fatal=self.fail)
        self._reporter = StatusReporter(self.bus, self.health)
        ControlListener(self.bus, self.reload, self._reporter.changed)
        self._workers: dict[str, Work] = {}
        self._servers: list[HttpServer] = []
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._leave = asyncio.Event()
        self._stopping = asyncio.Event()
        self._runs = asyncio.Event()
        """The bus does."""
        self._reload_asked = False
        self._fatal: FatalError | None = None

    @property
    def settings(self) -> S:
        """Those in effect."""
        return self._reloader.settings

    # --- for build --------------------------------------------------------------------------------
    def add_dependency(self, name: str, *, required: bool, check: Check, breaker: Breaker | None = None) -> None:
        """Adds a dependency to readiness and status. `check` raises when it cannot be used."""
        self.health.add_dependency(name, required=required, check=check, breaker_state=None if breaker is None else lambda: breaker.state)

    def add_worker(self, name: str, run: Work) -> None:
        """Adds a loop: `run(stopping)` is started with the service and restarted with backoff when it ends or raises.

        `stopping` tells it to finish what is in hand; at the drain deadline it is cancelled. A FatalError stops the service.
        """
        if name in self._workers:
            raise ValueError(f"there is a worker {name!r} already")
        self._workers[name] = run

    def add_http_server(
        self, app: Any, host: str, port: int, *, tls: ssl.SSLContext | None = None, protocol: type[asyncio.Protocol] | None = None
    ) -> tuple[str, int]:
        """Serves an ASGI application once the bus runs, over TLS where `tls` is given; processes may share the port. Returns the address.

        `protocol` is what speaks to a connection, in place of uvicorn's own. Raises OSError when the address is taken by something else.
        """
        server = HttpServer(app, host, port, drain=self.settings.drain, tls=tls, protocol=protocol)
        self._servers.append(server)
        return server.address

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Calls `close` after everything else has stopped, the last added first."""
        self._closing.append(close)

    def on_reload(self, prepare: Prepare[S]) -> None:
        """Calls `prepare(settings)` with freshly read settings, of which only `reloadable` ones differ.

        What it returns puts them into effect, once all are prepared, and must not fail. `prepare` raises ValueError where they cannot be.
        """
        self._reloader.follow(prepare)

    def fail(self, error: FatalError) -> None:
        """Stops the service with exit code 1 after saying why."""
        if self._fatal is None:
            _log.error("fatal error, the service stops", error=error.message)
            self._fatal = error
        self._leave.set()

    def reload(self) -> None:
        """Reads the settings again, now or as soon as the service has started. What cannot be taken changes nothing; the log tells it."""
        self._reload_asked = self.health.phase == "starting"
        if not self._reload_asked:
            self._reloader.reload()

    def stop(self) -> None:
        """Begins an orderly stop, as SIGTERM does."""
        self._leave.set()

    # --- life -------------------------------------------------------------------------------------
    async def run(self, build: Build[S]) -> int:
        """Runs until told to stop. Returns the exit code."""
        self._catch_signals()
        self._add_own_dependencies()
        admin = self._begin_admin()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._start(build, tasks)
            await self._leave.wait()
        except FatalError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001
            _log.exception("the service could not start")
            self.fail(FatalError(f"the service could not start: {error!r}"))
        await self._drain(tasks)
        await self._close(admin)
        return EXIT_FATAL if self._fatal else 0

    async def _start(self, build: Build[S], tasks: list[asyncio.Task[None]]) -> None:
        await build(self)
        if self.settings.serves_without_kafka:
            tasks.append(asyncio.create_task(self._joining(), name=_JOINING))
            self._serve(tasks)
        elif await self._joined():
            self._serve(tasks)

    async def _joining(self) -> None:
        """Starts the bus beside what serves already; what it finds fatal stops the service."""
        try:
            await self._joined()
        except FatalError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001
            _log.exception("the bus could not start")
            self.fail(FatalError(f"the bus could not start: {error!r}"))

    async def _joined(self) -> bool:
        """Waits until the bus runs; False when the order to stop comes first."""
        starting = asyncio.create_task(self._start_bus())
        leaving = asyncio.create_task(self._leave.wait())
        try:
            await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                return True
            return False
        finally:
            for task in (starting, leaving):
                task.cancel()
            await asyncio.gather(starting, leaving, return_exceptions=True)

    def _serve(self, tasks: list[asyncio.Task[None]]) -> None:
        tasks += [asyncio.create_task(self._supervised(name, work), name=name) for name, work in self._workers.items()]
        tasks.append(asyncio.create_task(self._reporter.run(), name=_STATUS))
        tasks += [asyncio.create_task(follow_file(file, seen, self.reload), name=_SETTINGS) for file, seen in self._file_seen]
        if self._servers:
            tasks.append(asyncio.create_task(self._open(), name="http"))
        else:
            self.health.phase = "serving"
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GARBAGE_THRESHOLDS)
        _log.info("service started", service=self.settings.service, instance=self.settings.instance)
        if self._reload_asked:
            self.reload()

    async def _open(self) -> None:
        """Serves once this replica is of use: until then others on the same port get what comes. Without Kafka it is of use as it is."""
        opening = asyncio.get_running_loop().time() + _OPENING.total_seconds()
        while not (self._runs.is_set() and await self.health.useful()) and not self._stopping.is_set():
            if asyncio.get_running_loop().time() >= opening:
                break
            await asyncio.sleep(_LOOK_AGAIN.total_seconds())
        if not self._stopping.is_set():
            for server in self._servers:
                server.listen()
            self.health.phase = "serving"
        await asyncio.gather(*(server.run_until_told() for server in self._servers))

    async def _start_bus(self) -> None:
        """Waits as long as Kafka or its topics are not there: the admin port says so meanwhile."""
        failures = 0
        while True:
            try:
                await self.bus.connect()
                break
            except PASSING as error:
                failures += 1
                _log.warning("waiting for Kafka", error=str(error), failures=failures)
                await asyncio.sleep(BACKOFF.pause(failures).total_seconds())
        await self.bus.start()
        self._runs.set()

    def _begin_admin(self) -> asyncio.Task[None]:
        listener = listening_socket(self.settings.admin_host, self.settings.admin_port)
        _log.info("admin port open", host=self.settings.admin_host, port=listener.getsockname()[1])
        return asyncio.create_task(
            serve_admin(self.health, self.settings.admin_host, self.settings.admin_port, bound_socket=listener), name="admin"
        )

    def _add_own_dependencies(self) -> None:
        self.add_dependency("kafka", required=self.settings.kafka_required, check=self.bus.check_kafka)
        self.add_dependency("postgres", required=self.settings.postgres_required, check=self.database.check, breaker=self.database.breaker)
        self.add_dependency("events", required=False, check=self._check_events)
        self.health.add_liveness("consumers", self.bus.check_live)

    async def _check_events(self) -> None:
        self.bus.check_progress()

    async def _supervised(self, name: str, work: Work) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await work(self._stopping)
                failures = 0
            except FatalError as error:
                self.fail(error)
                return
            except Exception:  # noqa: BLE001
                failures += 1
                _log.exception("worker failed, will be restarted", worker=name, failures=failures)
            if not self._stopping.is_set():
                await asyncio.sleep(BACKOFF.pause(max(1, failures)).total_seconds())

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        """Stops taking work and finishes what is in hand, everywhere at once, within the drain deadline."""
        self.health.phase = "draining"
        self._reporter.changed()
        self._stopping.set()
        for server in self._servers:
            server.leave()
        working = [task for task in tasks if task.get_name() not in (_STATUS, _SETTINGS, _JOINING)]
        draining = asyncio.create_task(self.bus.drain())
        _, late = await asyncio.wait({draining, *working}, timeout=(self.settings.drain + _SETTLE / 2).total_seconds())
        for task in late:
            _log.warning("not finished at the drain deadline", task=task.get_name())
        for task in (*late, *tasks):
            task.cancel()
        for outcome in await asyncio.gather(draining, *tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.warning("an error while draining", error=repr(outcome))

    async def _close(self, admin: asyncio.Task[None]) -> None:
        await self._quietly(self._reporter.report("stopped"))
        await self._quietly(self.bus.stop())
        for close in reversed(self._closing):
            await self._quietly(close())
        await self._quietly(self.database.close())
        admin.cancel()
        await asyncio.gather(admin, return_exceptions=True)
        _log.info("service stopped", fatal=self._fatal.message if self._fatal else None)

    async def _quietly(self, step: Awaitable[None]) -> None:
        """One step of the way out: neither an error nor a hang of one may keep the others from being taken."""
        try:
            async with asyncio.timeout(_SETTLE.total_seconds()):
                await step
        except Exception as error:  # noqa: BLE001
            _log.warning("an error while stopping", error=repr(error))

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)


def _log_level(settings: ServiceSettings) -> Swap:
    return partial(set_log_level, settings.telemetry.log_level)
