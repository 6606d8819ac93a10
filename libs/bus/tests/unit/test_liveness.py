"""A partition whose work stands still makes the process not live; one that waits, is paused or backs off does not."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import TopicPartition

from tessera.bus import consumer as consumers
from tessera.bus.bus import Bus
from tessera.bus.consumer import Consumer
from tessera.bus.partitions import Assignment, Gate, PartitionLoop
from tessera.bus.settings import ServiceSettings
from tessera.contracts.catalogue import TOPICS
from tessera.contracts.errors import FatalError, RetryableError
from tessera.testkit import eventually

pytestmark = pytest.mark.unit

PARTITION = TopicPartition("ingest", 0)


class MemorySettings(ServiceSettings, service="memory"):
    """Nothing of its own."""


def _is_not_called(error: FatalError) -> None:
    raise AssertionError(error)


class HangingLoop(PartitionLoop):
    """Takes an event and never comes back from it."""

    def __init__(self, gate: Gate) -> None:
        kafka = cast(Any, SimpleNamespace(assignment=lambda: {PARTITION}))
        assignment = Assignment(kafka, PARTITION, TOPICS["ingest"], "ingest", "memory.ingestion")
        super().__init__(assignment, gate, high_water=10, commit_every=timedelta(hours=1), on_fatal=_is_not_called)

    @property
    def position(self) -> int | None:
        return None

    def _has_work(self) -> bool:
        return True

    @property
    def _finished(self) -> int | None:
        return None

    async def _run(self) -> None:
        await self._taken(1)
        await asyncio.Event().wait()

    async def backs_off(self) -> None:
        await self._pause(40)


@pytest.fixture
async def consumer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Consumer]:
    monkeypatch.setattr(consumers, "_STALLED_AFTER", timedelta(milliseconds=50))
    passwords = {"worker_password": "never-used", "client_password": "never-used"}  # pragma: allowlist secret
    made = Bus(MemorySettings.model_validate({"postgres": passwords}), None, on_fatal=_is_not_called).consumer("ingestion")
    loop = HangingLoop(made._gate)
    made._loops[PARTITION] = loop
    loop.start()
    yield made
    await loop.close(timedelta(0))


def is_stalled(consumer: Consumer) -> bool:
    try:
        consumer.check_live()
    except RetryableError as error:
        return error.code == "consumer_stalled" and "partition=0" in error.message
    return False


async def test_work_without_progress_is_told(consumer: Consumer) -> None:
    consumer.check_live()
    consumer._loops[PARTITION].offer([cast(Any, SimpleNamespace(offset=0))])
    await eventually(lambda: is_stalled(consumer))


async def test_a_paused_consumer_is_not_stuck(consumer: Consumer) -> None:
    await eventually(lambda: is_stalled(consumer))
    consumer.pause()
    assert not is_stalled(consumer)
    consumer.resume()
    assert is_stalled(consumer)


async def test_backing_off_is_not_being_stuck(consumer: Consumer) -> None:
    loop = cast(HangingLoop, consumer._loops[PARTITION])
    await eventually(lambda: is_stalled(consumer))
    waiting = asyncio.create_task(loop.backs_off())
    await eventually(lambda: loop.state == "backing_off")
    assert not is_stalled(consumer)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
