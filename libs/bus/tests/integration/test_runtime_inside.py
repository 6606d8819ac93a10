"""The runtime inside the test's own process: what a second process cannot show."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tessera.bus.service import Runtime
from tessera.contracts.errors import FatalError, RetryableError
from tessera.contracts.events import ServiceControlled
from tessera.local.ports import free_ports
from tessera.testkit import CloudEventProducer, eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def runtime(ground: Any, probe: Any) -> Runtime[Any]:
    settings = probe.ProbeSettings(instance="inside", kafka=ground.kafka, postgres=ground.postgres, drain_seconds=2)
    return Runtime(settings)


async def test_a_whole_life(
    probe: Any,
    monkeypatch: pytest.MonkeyPatch,
    ground: Any,
    producer: CloudEventProducer,
    reader: Callable[..., Any],
) -> None:
    own = {"TESSERA_MEMORY__INSTANCE": "inside", "TESSERA_MEMORY__DRAIN_SECONDS": "2"}
    for name, value in {**ground.environment(), **own}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PROBE_HTTP_PORT", str(free_ports(("http",))["http"]))
    runtime = Runtime(probe.ProbeSettings())
    reloaded: list[Any] = []
    runtime.on_reload(lambda settings: lambda: reloaded.append(settings))
    runtime.add_dependency("optional", required=False, check=_down)
    running = asyncio.create_task(runtime.run(probe.build))
    await eventually(lambda: runtime.health.phase == "serving", timeout=30)
    assert (await runtime.health.ready()).status == "degraded"
    assert (await runtime.health.live()).live
    for action in ("pause", "reload"):
        await producer.publish("service.control", ServiceControlled(service="memory", action=action), tenantid="platform")
    await eventually(lambda: [consumer.status().state for consumer in runtime.bus.consumers] == ["paused", "paused"])
    await eventually(lambda: reloaded)
    monkeypatch.setenv("TESSERA_MEMORY__ADMIN_PORT", "wrong")
    for action in ("resume", "reload"):
        await producer.publish("service.control", ServiceControlled(service="memory", action=action), tenantid="platform")
    await eventually(lambda: [consumer.status().state for consumer in runtime.bus.consumers] == ["running", "running"])
    runtime.stop()
    assert await running == 0
    reports = await reader("service.status").until(lambda seen: any(event.data["state"] == "stopped" for event in seen))
    assert "degraded" in [event.data["state"] for event in reports]
    assert len(reloaded) == 1


async def _down() -> None:
    raise RetryableError("not there")


async def _fatal_worker(stopping: asyncio.Event) -> None:
    raise FatalError("the worker found a broken invariant")


async def _stubborn_worker(stopping: asyncio.Event) -> None:
    await asyncio.sleep(3_600)


def _with_worker(work: Any) -> Callable[[Runtime[Any]], Awaitable[None]]:
    async def build(runtime: Runtime[Any]) -> None:
        runtime.add_worker("work", work)

    return build


async def test_a_workers_fatal_error_ends_the_service(runtime: Runtime[Any]) -> None:
    assert await runtime.run(_with_worker(_fatal_worker)) == 1


async def test_a_worker_that_does_not_end_is_cut_off(runtime: Runtime[Any]) -> None:
    running = asyncio.create_task(runtime.run(_with_worker(_stubborn_worker)))
    await eventually(lambda: runtime.health.phase == "serving", timeout=30)
    runtime.stop()
    async with asyncio.timeout(15):
        assert await running == 0


async def test_a_build_that_fails_is_fatal(runtime: Runtime[Any]) -> None:
    async def build(runtime: Runtime[Any]) -> None:
        raise OSError("no such model")

    assert await runtime.run(build) == 1
