import asyncio
import time
from datetime import timedelta

import pytest
from prometheus_client import REGISTRY

from tessera.telemetry import Health

pytestmark = pytest.mark.unit


async def up() -> None:
    """Works."""


async def down() -> None:
    raise ConnectionError("refused by postgresql://me:hidden@host/db")


@pytest.fixture
def health() -> Health:
    health = Health("memory", "memory-1", check_timeout=timedelta(milliseconds=50), fresh_for=timedelta(0))
    health.phase = "serving"
    return health


async def test_all_up_is_ready(health: Health) -> None:
    health.add_dependency("postgres", required=True, check=up, breaker_state=lambda: "closed")
    report = await health.ready()
    assert (report.status, report.ready, report.dependencies["postgres"].status) == ("ready", True, "up")


async def test_a_required_dependency_down_is_unavailable_and_told_without_secrets(health: Health) -> None:
    health.add_dependency("postgres", required=True, check=down)
    health.add_dependency("redis", required=False, check=up)
    report = await health.ready()
    assert (report.status, report.ready) == ("unavailable", False)
    assert report.dependencies["postgres"].error == "ConnectionError: refused by postgresql://me:[redacted]@host/db"
    assert report.dependencies["redis"].error is None


async def test_an_optional_dependency_down_is_degraded_and_can_serve(health: Health) -> None:
    health.add_dependency("postgres", required=True, check=up)
    health.add_dependency("redis", required=False, check=down)
    report = await health.ready()
    assert (report.status, report.ready) == ("degraded", True)


@pytest.mark.parametrize(("state", "status"), [("closed", "up"), ("half_open", "up"), ("open", "down")])
async def test_an_open_breaker_is_down(health: Health, state: str, status: str) -> None:
    health.add_dependency("postgres", required=True, check=up, breaker_state=lambda: state)
    report = (await health.ready()).dependencies["postgres"]
    assert (report.status, report.breaker) == (status, state)


async def test_checks_run_at_once_and_a_hanging_one_is_down(health: Health) -> None:
    for number in range(10):
        health.add_dependency(f"slow-{number}", required=False, check=lambda: asyncio.sleep(60))
    started = time.monotonic()
    report = await health.ready()
    assert time.monotonic() - started < 0.4
    assert {dependency.error for dependency in report.dependencies.values()} == {"no answer within 0.05 s"}


@pytest.mark.parametrize("phase", ["starting", "draining"])
async def test_before_and_after_serving_it_is_not_ready(health: Health, phase: str) -> None:
    health.phase = phase  # type: ignore[assignment]
    report = await health.ready()
    assert (report.status, report.ready) == (phase, False)


async def test_a_new_replica_is_starting() -> None:
    assert (await Health().ready()).status == "starting"


async def test_a_burst_of_probes_costs_one_check() -> None:
    health, checks = Health(fresh_for=timedelta(seconds=60)), 0

    async def check() -> None:
        nonlocal checks
        checks += 1

    health.add_dependency("postgres", required=True, check=check)
    await asyncio.gather(*(health.ready() for _ in range(20)))
    assert checks == 1
    health.add_dependency("redis", required=False, check=up)
    assert set((await health.ready()).dependencies) == {"postgres", "redis"}


async def test_metrics_say_the_same(health: Health) -> None:
    health.add_dependency("cache-up", required=False, check=up, breaker_state=lambda: "half_open")
    health.add_dependency("cache-down", required=False, check=down)
    await health.ready()
    assert REGISTRY.get_sample_value("tessera_dependency_up", {"dependency": "cache-up"}) == 1
    assert REGISTRY.get_sample_value("tessera_dependency_up", {"dependency": "cache-down"}) == 0
    assert REGISTRY.get_sample_value("tessera_breaker_open", {"dependency": "cache-up"}) == 0.5


async def test_live_names_each_stuck_loop(health: Health) -> None:
    def stuck() -> None:
        raise RuntimeError("the poll loop has not turned for 60 s")

    health.add_liveness("loop", up)
    assert (await health.live()).live
    health.add_liveness("consumer", stuck)
    report = await health.live()
    assert (report.status, report.failed) == ("stuck", {"consumer": "RuntimeError: the poll loop has not turned for 60 s"})


async def test_a_name_is_used_once(health: Health) -> None:
    health.add_dependency("redis", required=False, check=up)
    health.add_liveness("loop", up)
    with pytest.raises(ValueError, match="redis"):
        health.add_dependency("redis", required=False, check=up)
    with pytest.raises(ValueError, match="loop"):
        health.add_liveness("loop", up)
