"""The life of a service process: start, readiness, status, control, workers, HTTP, stop."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tessera.bus import make_topics, topics
from tessera.bus.settings import KafkaSettings
from tessera.contracts.events import ServiceControlled
from tessera.local.ports import free_ports
from tessera.testkit import CloudEventProducer, Stack, eventually, unique_kafka_prefix

pytestmark = pytest.mark.integration


async def ready(port: int) -> dict[str, Any]:
    try:
        async with httpx.AsyncClient() as client:
            response = await client.get(f"http://127.0.0.1:{port}/health/ready")
    except httpx.TransportError:
        return {}
    return dict(response.json()) if response.status_code == 200 else {}


async def test_a_service_says_how_it_is_and_obeys_control(
    ground: Any, process: Any, producer: CloudEventProducer, reader: Callable[..., Any], tmp_path: Path
) -> None:
    settings = tmp_path / "settings.env"
    settings.touch()
    admin = free_ports(("admin",))["admin"]
    await process.start(TESSERA_MEMORY__ADMIN_PORT=str(admin), TESSERA_MEMORY__INSTANCE="probe-1", TESSERA_SETTINGS_FILE=str(settings))
    report = await eventually(lambda: ready(admin), timeout=20)
    assert {name: dependency["status"] for name, dependency in report["dependencies"].items()} == {
        "kafka": "up",
        "postgres": "up",
        "events": "up",
    }
    await eventually(lambda: "worker runs" in process.log())
    for command in (
        ServiceControlled(service="memory", action="pause", consumer="chat"),
        ServiceControlled(service="memory", action="pause", consumer="ingestion", instance="another"),
        ServiceControlled(service="memory", action="reload"),
    ):
        await producer.publish("service.control", command, tenantid="platform")
    status = reader("service.status")
    await status.until(lambda seen: any(_states(event) == {"chat": "paused", "ingestion": "running"} for event in seen))
    await eventually(lambda: process.log().count('"taken"') == 1)
    process.tell(signal.SIGHUP)
    await eventually(lambda: process.log().count('"taken"') == 2)
    settings.write_text("TESSERA__TELEMETRY__LOG_LEVEL=DEBUG")
    await eventually(lambda: '"log_level": "DEBUG"' in process.log(), timeout=20)
    settings.write_text("TESSERA__DRAIN_SECONDS=4")
    process.tell(signal.SIGHUP)
    await eventually(lambda: "a restart is needed" in process.log(), timeout=20)
    process.tell(signal.SIGTERM)
    assert await process.ended() == 0
    seen = await status.until(lambda seen: seen[-1].data["state"] == "stopped")
    assert {event.key for event in seen} == {b"memory/probe-1"}
    assert {event.data["state"] for event in seen} >= {"ready", "stopped"}
    assert seen[-1].data["version"]
    log = process.log()
    assert log.index("worker ends in peace") < log.index('"closed"') < log.index("service stopped")


def _states(event: Any) -> dict[str, str]:
    return {consumer["name"]: consumer["state"] for consumer in event.data["consumers"]}


async def test_two_processes_share_a_port_and_a_stop_lets_open_streams_end(ground: Any, process: Any, new_process: Any) -> None:
    port = str(free_ports(("http",))["http"])
    await process.start(PROBE_HTTP_PORT=port)
    await eventually(lambda: "service started" in process.log(), timeout=20)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client, client.stream("GET", "/stream/3") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "0"
        second = new_process("second")
        await second.start(PROBE_HTTP_PORT=port)
        await eventually(lambda: "service started" in second.log(), timeout=20)
        told = time.monotonic()
        process.tell(signal.SIGTERM)
        assert [line async for line in lines][-1] == "29"
    assert await process.ended() == 0
    assert time.monotonic() - told < 15
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/stream/1")).status_code == 200


async def test_a_stop_does_not_wait_longer_than_the_drain_deadline(process: Any) -> None:
    port = str(free_ports(("http",))["http"])
    await process.start(PROBE_HTTP_PORT=port, TESSERA_MEMORY__DRAIN_SECONDS="1")
    await eventually(lambda: "service started" in process.log(), timeout=20)
    with pytest.raises(httpx.RemoteProtocolError):
        await _read_on(f"http://127.0.0.1:{port}/stream/60", lambda: process.tell(signal.SIGTERM))
    assert await process.ended() == 0


async def _read_on(url: str, after_the_first: Callable[[], None]) -> None:
    async with httpx.AsyncClient() as client, client.stream("GET", url) as response:
        lines = response.aiter_lines()
        await anext(lines)
        after_the_first()
        async for _ in lines:
            pass


async def test_a_service_waits_for_its_topics_and_says_so(stack: Stack, ground: Any, new_process: Any) -> None:
    kafka = KafkaSettings(bootstrap_servers=stack.kafka_bootstrap_servers, topic_prefix=unique_kafka_prefix(), keyed_partitions=2)
    early = new_process("early")
    await early.start(TESSERA__KAFKA__TOPIC_PREFIX=kafka.topic_prefix)
    await eventually(lambda: "topics are missing" in early.log(), timeout=20)
    await topics.ensure_all(kafka)
    await eventually(lambda: "service started" in early.log(), timeout=30)
    early.tell(signal.SIGTERM)
    assert await early.ended() == 0


async def test_a_stop_while_it_waits_for_kafka_is_a_stop(new_process: Any) -> None:
    lonely = new_process("lonely")
    await lonely.start(TESSERA__KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    await eventually(lambda: "waiting for Kafka" in lonely.log(), timeout=20)
    lonely.tell(signal.SIGTERM)
    assert await lonely.ended() == 0
    assert all(json.loads(line) for line in lonely.log().splitlines() if line.startswith("{"))


def test_the_command_makes_topics_once(stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TESSERA__KAFKA__BOOTSTRAP_SERVERS", stack.kafka_bootstrap_servers)
    monkeypatch.setenv("TESSERA__KAFKA__TOPIC_PREFIX", unique_kafka_prefix())
    monkeypatch.setenv("TESSERA__KAFKA__KEYED_PARTITIONS", "1")
    assert make_topics.main(["acme"]) == 0
    assert make_topics.main(["acme"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert not first.endswith(" 0 made")
    assert second.endswith(" 0 made")
    monkeypatch.setenv("TESSERA__KAFKA__KEYED_PARTITIONS", "2")
    monkeypatch.setattr(topics, "_WAIT_SECONDS", 0.2)
    assert make_topics.main(["acme"]) == 1
    assert "partitions, not 2" in capsys.readouterr().err
