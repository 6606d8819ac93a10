"""Killed with SIGKILL at named points, with a sweep in flight, and started again."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from tessera.contracts.events import SweepRequested
from tessera.testkit.plugin import ServiceFactory
from tessera.testkit.waiting import eventually

pytestmark = pytest.mark.integration

OLD = timedelta(days=40)
REPLY_PARTITION = 3
KILLED = -9


async def test_a_sweep_killed_twice_goes_on_and_asks_for_each_memory_once(
    service_process: ServiceFactory, world: Any, wire: Any, known: Any
) -> None:
    """Where its plan is made, and where it has asked."""
    environment = {"TESSERA_RETENTION__CRASH_POINT": "sweep_planned_before_commit", "TESSERA_RETENTION__SWEEPS__LEASE_SECONDS": "1"}
    service = await asyncio.to_thread(
        service_process, "retention", database=world.database, kafka_prefix=world.kafka_prefix, environment=environment
    )
    await wire.submit(max_age_days=30)
    planned = {await wire.record(age=OLD) for _ in range(5)}
    await known(5)
    sweep_id = str(uuid4())
    asked = SweepRequested(reply_partition=REPLY_PARTITION, sweep_id=sweep_id, dry_run=False)
    await wire.send("sweep.requested", asked, key=wire.sweep_key(sweep_id))
    for next_point in ("sweep_asked_before_commit", ""):
        await eventually(lambda: service.exit_code == KILLED)
        service.override(TESSERA_RETENTION__CRASH_POINT=next_point)
        service.start()
    assert set(await wire.obey(sweep_id, 5)) == planned
    report = await wire.ended(sweep_id)
    assert (report.state, report.archived) == ("completed", 5)
    assert len(await wire.asked(sweep_id, 5)) == 1
