"""Joining, standing by, getting stuck and joining anew, on a real broker that is stopped, frozen and started again."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
from aiokafka.errors import KafkaError

from tessera.bus import broker, feeds, watch
from tessera.contracts.errors import RetryableError
from tessera.contracts.events import MessagePublished, TenantChanged
from tessera.local.kafka import Kafka, KafkaLimits, cached_distribution
from tessera.local.ports import free_ports
from tessera.testkit import CloudEventProducer, eventually
from tessera.testkit.kafka import CopiedKafka

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
BROKER_FREEZES = True

PATIENCE = timedelta(seconds=60)
EFFECTS = "SELECT event_id FROM memory.effect ORDER BY position"


async def publish(producer: CloudEventProducer, *names: str) -> None:
    for name in names:
        data = MessagePublished(conversation_id=name, role="user", content=name)
        await producer.publish("ingest", data, id=name, key=name.encode(), tenantid="acme")


async def applied(ground: Any, *names: str) -> None:
    """Waits until each has had its effect, and checks that it was one."""

    async def all_there() -> bool:
        return set(names) <= {row[0] for row in await ground.rows(EFFECTS)}

    await eventually(all_there, PATIENCE)
    found = [row[0] for row in await ground.rows(EFFECTS)]
    assert len(found) == len(set(found))


def partitions(running: Any) -> int:
    return int(running.bus.consumer("ingestion").status().partitions)


@pytest.fixture(scope="module")
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker that these tests may kill and freeze; each leaves it running."""
    ports = free_ports(("broker", "controller"))
    folder = tmp_path_factory.mktemp("own")
    kafka = CopiedKafka(folder / "kafka", ports["broker"], ports["controller"], cached_distribution(), KafkaLimits(heap_megabytes=256))
    kafka.start()
    kafka.wait_ready()
    yield kafka
    kafka.stop()


@pytest.fixture
async def at_risk(ground: Any, own_kafka: Kafka, make_topics: Any) -> Any:
    """The ground of `ground`, on that broker."""
    exposed = replace(ground, kafka=ground.kafka.model_copy(update={"bootstrap_servers": own_kafka.bootstrap_servers}))
    await make_topics(exposed.kafka)
    return exposed


async def test_a_member_without_partitions_stands_by_and_takes_over(
    ground: Any, new_bus: Callable[..., Any], producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three members for two partitions; the one that stands by outlives the poll interval after which Kafka's client gives up."""
    interval = 2.0
    connected = broker.PatientBroker._consumer
    monkeypatch.setattr(
        broker.PatientBroker,
        "_consumer",
        lambda self, **options: connected(self, **{**options, "max_poll_interval_ms": int(interval * 1000)}),
    )
    members = [new_bus(name) for name in ("one", "two", "three")]
    for member in members:
        await member.start()
    try:
        await eventually(lambda: sorted(map(partitions, members)) == [0, 1, 1], PATIENCE)
        standby = next(member for member in members if partitions(member) == 0)
        await asyncio.sleep(2 * interval)  # what is tested is that time passes
        await publish(producer, "with-three-members")
        await applied(ground, "with-three-members")
        for member in members:
            if member is not standby:
                await member.stop()
        await publish(producer, "afterwards")
        await applied(ground, "with-three-members", "afterwards")
        await eventually(lambda: partitions(standby) == 2, PATIENCE)
    finally:
        await asyncio.gather(*(member.stop() for member in members))


async def test_after_a_restart_of_the_broker_consumption_goes_on(at_risk: Any, own_kafka: Kafka, new_bus: Callable[..., Any]) -> None:
    bus = new_bus(kafka=at_risk.kafka)
    producer = CloudEventProducer(own_kafka.bootstrap_servers, at_risk.kafka.topic_prefix)
    await bus.start()
    try:
        for round_ in ("clean", "killed"):
            await publish(producer, f"before-{round_}")
            await applied(at_risk, f"before-{round_}")
            await asyncio.to_thread(own_kafka.stop if round_ == "clean" else own_kafka.kill)
            with pytest.raises(RetryableError):
                await bus.bus.check_kafka()
            await asyncio.to_thread(own_kafka.start)
            await asyncio.to_thread(own_kafka.wait_ready)
            await publish(producer, f"after-{round_}")
            await applied(at_risk, f"after-{round_}")
        bus.bus.check_live()
        assert not bus.fatal
    finally:
        await bus.stop()


async def test_after_a_coordinator_was_away_beyond_the_session_consumption_goes_on(
    at_risk: Any, own_kafka: Kafka, new_bus: Callable[..., Any]
) -> None:
    kafka = at_risk.kafka.model_copy(update={"session_timeout_seconds": 6.0, "request_timeout_seconds": 5.0})
    bus = new_bus(kafka=kafka)
    producer = CloudEventProducer(own_kafka.bootstrap_servers, kafka.topic_prefix)
    await bus.start()
    try:
        await publish(producer, "before")
        await applied(at_risk, "before")
        frozen = psutil.Process(own_kafka.pid)
        frozen.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(kafka.session_timeout_seconds + 4)  # what is tested is that time passes
        finally:
            frozen.send_signal(signal.SIGCONT)
        await publish(producer, "after")
        await applied(at_risk, "before", "after")
        bus.bus.check_live()
        assert not bus.fatal
    finally:
        await bus.stop()


async def test_a_consumer_that_is_alive_but_stuck_joins_anew(
    ground: Any, new_bus: Callable[..., Any], producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that ended with an error leaves aiokafka raising that error for ever (its #1154)."""
    monkeypatch.setattr(watch, "LOOK_EVERY", timedelta(seconds=0.5))
    kafka = ground.kafka.model_copy(update={"rebalance_timeout_seconds": 3.0})
    bus = new_bus(kafka=kafka, drain_seconds=2.0)
    await bus.start()
    try:
        await publish(producer, "before")
        await applied(ground, "before")
        consumer = bus.bus.consumer("ingestion")
        stuck = consumer._joined.consumer
        monkeypatch.setattr(type(stuck._coordinator), "_do_heartbeat", _unforeseen(stuck._coordinator))
        await eventually(stuck._coordinator._heartbeat_task.done, PATIENCE)
        await publish(producer, "after")
        await applied(ground, "before", "after")
        assert consumer._joined.consumer is not stuck
        assert _is_gone(stuck)
        consumer.check_live()
        assert not bus.fatal
    finally:
        await bus.stop()


def _is_gone(stuck: Any) -> bool:
    """Whether a client that was replaced reads nothing any more and has closed every connection."""
    return stuck._fetcher._fetch_task.done() and not any(connection.connected() for connection in stuck._client._conns.values())


def _unforeseen(victim: Any) -> Any:
    """What a broker that still loads its groups makes of one client's heartbeat: an error the client does not know there."""
    beats = type(victim)._do_heartbeat

    async def beat(coordinator: Any) -> bool:
        if coordinator is victim:
            raise KafkaError("Unexpected exception in heartbeat task: CoordinatorLoadInProgressError()")
        return bool(await beats(coordinator))

    return beat


async def test_a_consumer_that_fetches_nothing_although_there_is_something_joins_anew(
    ground: Any, new_bus: Callable[..., Any], producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_EVERY", timedelta(seconds=0.5))
    kafka = ground.kafka.model_copy(update={"rebalance_timeout_seconds": 3.0})
    bus = new_bus(kafka=kafka, drain_seconds=2.0)
    await bus.start()
    try:
        await publish(producer, "before")
        await applied(ground, "before")
        stuck = bus.bus.consumer("ingestion")._joined.consumer
        stuck._fetcher._fetch_task.cancel()
        await publish(producer, "by-the-fetch-under-way")
        await applied(ground, "before", "by-the-fetch-under-way")
        await publish(producer, "after")
        await applied(ground, "before", "after")
        assert bus.bus.consumer("ingestion")._joined.consumer is not stuck
    finally:
        await bus.stop()


async def test_a_table_whose_client_is_stuck_goes_on_where_it_was(
    new_bus: Callable[..., Any], probe: Any, producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_EVERY", timedelta(seconds=0.5))
    monkeypatch.setattr(feeds, "_PATIENCE", timedelta(seconds=3))
    heard: list[str] = []
    tables: list[Any] = []

    def register(bus: Any) -> None:
        probe.register(bus)
        tables.append(bus.table(TenantChanged, lambda event: heard.append(event.data.tenant)))

    bus = new_bus(register=register)
    await bus.start()
    try:
        await declare(producer, "first")
        await eventually(lambda: heard == ["first"], PATIENCE)
        stuck = tables[0]._feed.consumer
        stuck._fetcher._fetch_task.cancel()
        await declare(producer, "second")
        await eventually(lambda: heard == ["first", "second"], PATIENCE)
        await declare(producer, "third")
        await eventually(lambda: heard == ["first", "second", "third"], PATIENCE)
        assert tables[0]._feed.consumer is not stuck
        bus.bus.check_live()
    finally:
        await bus.stop()


async def test_a_change_that_takes_long_does_not_make_its_table_stuck(
    new_bus: Callable[..., Any], probe: Any, producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_EVERY", timedelta(seconds=0.1))
    monkeypatch.setattr(feeds, "_PATIENCE", timedelta(seconds=0.5))
    tables: list[Any] = []
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def on_change(event: Any) -> None:
        begun.set()
        await may_end.wait()

    def register(bus: Any) -> None:
        probe.register(bus)
        tables.append(bus.table(TenantChanged, on_change))

    bus = new_bus(register=register)
    await bus.start()
    try:
        reading = tables[0]._feed.consumer
        await declare(producer, "slow")
        await asyncio.wait_for(begun.wait(), PATIENCE.total_seconds())
        await asyncio.sleep(3)  # what is tested is that time passes
        assert tables[0]._feed.consumer is reading
        bus.bus.check_live()
    finally:
        may_end.set()
        await bus.stop()


async def declare(producer: CloudEventProducer, tenant: str) -> None:
    changed = TenantChanged(tenant=tenant, state="active", changed_at=datetime.now(UTC))
    await producer.publish("tenant.changed", changed, key=b"one-partition", tenantid=tenant)
