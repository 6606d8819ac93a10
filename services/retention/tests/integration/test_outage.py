"""Postgres goes away under a running service and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tessera.contracts.events import PolicyReported, PolicySubmitted, RetentionPolicy
from tessera.testkit.plugin import ServiceFactory
from tessera.testkit.services import ServiceProcess
from tessera.testkit.waiting import eventually
from tessera.testkit.wire import Wire

pytestmark = pytest.mark.integration


@pytest.fixture
def world(make_world: Any) -> Any:
    """One for each test: the outage is not shared."""
    return make_world()


@pytest.fixture
def link(world: Any) -> Iterator[Wire]:
    """The way to Postgres."""
    link = Wire(world.database.settings("retention").port)
    yield link
    link.cut()


async def becomes(service: ServiceProcess, status: int, word: str, breaker: str) -> None:
    """Waits until readiness says this, and this of Postgres's breaker."""
    await eventually(lambda: service.readiness("postgres") == (status, word, breaker))


async def test_without_postgres_it_is_not_ready_and_answers_what_waited_once_it_is_back(
    service_process: ServiceFactory, world: Any, wire: Any, link: Wire
) -> None:
    environment = {"TESSERA_RETENTION__POSTGRES__HOST": "127.0.0.1", "TESSERA_RETENTION__POSTGRES__PORT": str(link.port)}
    service = await asyncio.to_thread(
        service_process, "retention", database=world.database, kafka_prefix=world.kafka_prefix, environment=environment
    )
    assert (await wire.submit(max_age_days=30)).version == 1
    link.cut()
    identity = await wire.send("policy.requested", PolicySubmitted(reply_partition=3, policy=RetentionPolicy(max_age_days=7)))
    await becomes(service, 503, "unavailable", "open")
    link.mend()
    events = await wire.replies.until(lambda seen: any(e.attributes.get("correlationid") == identity for e in seen))
    told = PolicyReported.model_validate(next(e for e in events if e.attributes.get("correlationid") == identity).data)
    assert told.version == 2
    await becomes(service, 200, "ready", "closed")
