"""Killed with SIGKILL with a validation in flight, and started again."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from tessera.contracts.events import RequestFailed
from tessera.testkit.events import CloudEventReader
from tessera.testkit.plugin import ServiceFactory
from tessera.testkit.stack import Stack
from tessera.testkit.waiting import eventually

pytestmark = pytest.mark.integration

KILLED = -9


@pytest.fixture
def world(make_world: Any) -> Any:
    """One for each test: a killed service is not shared."""
    return make_world()


async def test_a_killed_validation_is_taken_up_again_and_completes_once(
    service_process: ServiceFactory, world: Any, wire: Any, wine: Any
) -> None:
    environment = {
        **world.environment,
        "TESSERA_VALIDATOR__CRASH_POINT": "validation_judged_before_commit",
        "TESSERA_VALIDATOR__VALIDATIONS__LEASE_SECONDS": "3",
        "TESSERA_VALIDATOR__VALIDATIONS__PROLONG_SECONDS": "1",
    }
    service = await asyncio.to_thread(
        service_process, "validator", database=world.database, kafka_prefix=world.kafka_prefix, environment=environment
    )
    validation_id = str(uuid4())
    request = wire.request(validation_id, await wire.store(wine[1]), await wire.store(wine[0]))
    await wire.send(request, validation_id)
    await eventually(lambda: service.exit_code == KILLED, timeout=30)
    service.override(TESSERA_VALIDATOR__CRASH_POINT="")
    service.start()
    ended = await wire.ended(validation_id)
    assert (ended.state, ended.report.verdict) == ("completed", "approve")
    assert len(await wire.completed.read(1)) == 1


async def test_a_dataset_that_kills_the_process_every_time_is_given_up(
    service_process: ServiceFactory, world: Any, wire: Any, wine: Any
) -> None:
    environment = {
        **world.environment,
        "TESSERA_VALIDATOR__CRASH_POINT": "validation_judged_before_commit",
        "TESSERA_VALIDATOR__VALIDATIONS__LEASE_SECONDS": "2",
        "TESSERA_VALIDATOR__VALIDATIONS__PROLONG_SECONDS": "1",
        "TESSERA_VALIDATOR__VALIDATIONS__ATTEMPTS": "1",
    }
    service = await asyncio.to_thread(
        service_process, "validator", database=world.database, kafka_prefix=world.kafka_prefix, environment=environment
    )
    validation_id = str(uuid4())
    request = wire.request(validation_id, await wire.store(wine[1]), await wire.store(wine[0]))
    await wire.send(request, validation_id)
    await eventually(lambda: service.exit_code == KILLED, timeout=30)
    service.start()  # the crash point is still armed: only giving up keeps the process alive
    ended = await wire.ended(validation_id)
    assert (ended.state, ended.problem.code) == ("failed", "validation_broke")


async def test_a_command_that_is_given_up_is_told_to_its_asker_and_kept_for_operators(
    service_process: ServiceFactory, stack: Stack, world: Any, wire: Any, wine: Any
) -> None:
    environment = {**world.environment, "TESSERA_VALIDATOR__CRASH_POINT": "consumed_before_commit"}
    service = await asyncio.to_thread(
        service_process, "validator", database=world.database, kafka_prefix=world.kafka_prefix, environment=environment
    )
    validation_id = str(uuid4())
    request = wire.request(validation_id, await wire.store(wine[1]), await wire.store(wine[0]))
    identity = await wire.send(request, validation_id)
    for next_point in ("consumed_before_commit", "consumed_before_commit", ""):
        await eventually(lambda: service.exit_code == KILLED, timeout=30)
        service.override(TESSERA_VALIDATOR__CRASH_POINT=next_point)
        service.start()
    [failure] = await wire.replies.of_type(RequestFailed.event_type)
    assert (failure.attributes["correlationid"], failure.data["problem"]["code"]) == (identity, "consumer_crashed")
    letters = CloudEventReader(stack.kafka_bootstrap_servers, "validation.requested.validator.dlq", topic_prefix=world.kafka_prefix)
    [letter] = await letters.read(1)
    await letters.close()
    assert (letter.id, letter.headers["tessera_dead_letter_code"]) == (identity, b"consumer_crashed")
    assert letter.data["validation_id"] == validation_id
