"""The pytest plugin: `pytest_plugins = ["tessera.testkit.plugin"]` in the root conftest."""

import contextlib
import os
from collections.abc import Callable, Container, Generator, Iterator, Mapping

import pytest
import structlog

from tessera.local import ports
from tessera.testkit.databases import PostgresDatabase, new_database
from tessera.testkit.events import unique_kafka_prefix
from tessera.testkit.services import ServiceProcess
from tessera.testkit.stack import Stack, remove_abandoned

DatabaseFactory = Callable[..., PostgresDatabase]
"""`postgres_database("memory", "retention")`."""
ServiceFactory = Callable[..., ServiceProcess]
"""`service_process("memory", database=…, kafka_prefix=…, environment={…}, wait=True)`."""
_PORTS = ports.CHOICE


def ports_of_worker(number: int, workers: int) -> range:
    """Every so many-th port, so that no two workers have one in common."""
    return _PORTS[number::workers]


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    """Without a configuration structlog draws every traceback with all its variables, which takes seconds."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Kafka, Postgres and Redis for this run. See `tessera.testkit.stack`."""
    remove_abandoned()
    started = Stack()
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def postgres_database(stack: Stack) -> Iterator[DatabaseFactory]:
    """Makes a fresh, migrated database for the services named; the module's databases are dropped at its end."""
    with contextlib.ExitStack() as made:

        def create(*services: str) -> PostgresDatabase:
            database = new_database(stack, services)
            made.callback(database.drop)
            return database

        yield create


@pytest.fixture
def kafka_prefix() -> str:
    """A topic and group prefix of this test alone (`unique_kafka_prefix()` gives one to fixtures of a wider scope)."""
    return unique_kafka_prefix()


@pytest.fixture
def service_process(stack: Stack) -> Iterator[ServiceFactory]:
    """Starts real service processes, which are stopped at the end of the test."""
    with contextlib.ExitStack() as started:

        def start(
            service: str,
            *,
            database: PostgresDatabase | None = None,
            kafka_prefix: str = "",
            environment: Mapping[str, str] | None = None,
            wait: bool = True,
        ) -> ServiceProcess:
            process = ServiceProcess(service, stack, database, kafka_prefix, environment or {})
            started.callback(process.stop)
            process.start()
            if wait:
                process.wait_ready()
            return process

        yield start


SUITES = ("bench", "chaos", "e2e", "contract", "integration", "unit")
_GROUP = "xdist_group"
_SHARED = "platform"
"""Tests that use the run's one platform follow one another on one worker: it is started once, and stopped when the last is through."""
_ends: dict[str, Callable[[], None]] = {}
_ELAPSED = pytest.StashKey[dict[str, tuple[int, float]]]()


def suite_of(node_id: str, words: Container[str]) -> str:
    """The suite of a test: its marker, else the folder that it lies in, else `unit`."""
    marked = next((suite for suite in SUITES if suite in words), None)
    return marked or next((suite for suite in SUITES if suite in node_id.split("::", maxsplit=1)[0].split("/")), "unit")


def shares_platform(item: pytest.Item) -> bool:
    """Whether the test uses the run's one platform."""
    return _SHARED in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Under pytest-xdist a file stays together on one worker, for the sake of its module's fixtures; what takes longest comes first.

    Files that share more name a group: `pytest.mark.xdist_group("platform")`.
    """
    for item in items:
        if item.get_closest_marker(_GROUP) is None:
            item.add_marker(pytest.mark.xdist_group(_SHARED if shares_platform(item) else item.location[0]))
    yield
    items.sort(key=_turn)  # stable: within a suite the order that pytest-randomly chose stays


def _turn(item: pytest.Item) -> tuple[int, int, str]:
    """The platform's tests together, then suite after suite: short tests at the end keep every worker busy until then.

    Of the platform's group, those come last that break another one beside it, so that two are up only as long as they must be. The tests of
    any other group that files name stand together too.
    """
    suite = SUITES.index(suite_of(item.nodeid, item.keywords))
    (group,) = {str(marker.args[0]) for marker in item.iter_markers(_GROUP)}
    if group == _SHARED:
        return 0 if shares_platform(item) else 1, int(suite == SUITES.index("chaos")), ""
    return 2, suite, "" if group == item.location[0] else group


def until_last_use(fixture: str, stop: Callable[[], None]) -> None:
    """Call `stop` after the last test that uses this fixture of the session, instead of at its end: what idles slows all that follows.

    Its tests must stand together: they are of the platform's group, or of one that their files name.
    """
    _ends[fixture] = stop


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop what no test that follows uses."""
    used, wanted = (set(getattr(each, "fixturenames", ())) for each in (item, nextitem))
    for fixture in _ends.keys() & (used - wanted):
        _ends.pop(fixture)()


class _Clock:
    """Adds up the time of each suite, fixtures included. With pytest-xdist that is the workers' time."""

    def __init__(self, config: pytest.Config) -> None:
        self._elapsed = config.stash.setdefault(_ELAPSED, {})
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = suite_of(report.nodeid, report.keywords)
        count, seconds = self._elapsed.get(suite, (0, 0.0))
        self._elapsed[suite] = (count + (report.when == "call"), seconds + report.duration)
        reporter = self._plugins.get_plugin("terminalreporter")  # a worker of pytest-xdist has none
        if report.failed and reporter is not None:
            # A long run tells at once what the summary at its end explains.
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", "").partition("\n")[0]
            reporter.write_line(f"\nFAILED {report.nodeid} ({report.when}) {reason}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Register the clock, and the mark that means something only under pytest-xdist; give each worker ports of its own.

    What a test stops, or cuts off, for a while must find its port free afterwards.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    ports.CHOICE = ports_of_worker(int(worker), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    config.addinivalue_line("markers", "xdist_group: which worker a test goes to, under pytest-xdist")
    config.pluginmanager.register(_Clock(config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the time of each suite."""
    elapsed = config.stash.get(_ELAPSED, {})
    if elapsed:
        terminalreporter.section("time per suite")
        for suite, (count, seconds) in sorted(elapsed.items(), key=lambda entry: -entry[1][1]):
            terminalreporter.write_line(f"{suite:<12} {count:>5} tests {seconds:>8.1f} s")
