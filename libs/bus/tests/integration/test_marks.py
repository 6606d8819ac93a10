"""The mark of a batch that is set with the position before it (docs/delivery.md)."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tessera.bus import Bus, Received, Transaction, faults, transactional
from tessera.bus.positions import Mark, PositionRow
from tessera.contracts.events import MessagePublished
from tessera.testkit import CloudEventProducer, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

PATIENT = timedelta(seconds=30)


@pytest.fixture
def ground(ground: Any) -> Any:
    """One event in a batch, so that another one always waits."""
    return replace(ground, kafka=ground.kafka.model_copy(update={"batch_records": 1}))


async def test_a_consumer_that_is_paused_gives_the_next_batchs_mark_back(
    ground: Any, running: Callable[..., Any], probe: Any, producer: CloudEventProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[str] = []
    ahead: list[Mark | None] = []
    buses: list[Bus] = []
    advance = PositionRow.advance

    async def handler(event: Received[MessagePublished], _: Transaction) -> None:
        handled.append(str(event.data.content))

    def register(bus: Bus) -> None:
        buses.append(bus)
        probe.register(bus, handler)

    async def told(row: PositionRow, connection: Any, stored: int, next_offset: int, following: Mark | None = None) -> None:
        ahead.append(following)
        await advance(row, connection, stored, next_offset, following)

    def pause_at_first(point: str) -> None:
        if point == faults.CONSUMED_BEFORE_COMMIT and len(ahead) == 1:
            buses[0].consumer("ingestion").pause()

    monkeypatch.setattr(PositionRow, "advance", told)
    monkeypatch.setattr(transactional.faults, "reach", pause_at_first)
    for content in ("first", "second", "third"):
        message = MessagePublished(conversation_id="c", role="user", content=content)
        await producer.publish("ingest", message, id=content, key=b"c", partition=0, tenantid="acme")

    async def marks() -> list[Any]:
        return list(await ground.rows("SELECT first_offset, last_offset FROM memory.batch_mark WHERE topic = 'ingest'"))

    async def nothing_in_hand() -> bool:
        return handled == ["first"] and not await marks()

    async with running(register=register):
        await eventually(nothing_in_hand, PATIENT)
        assert ahead == [Mark(1, 1)]
        buses[0].consumer("ingestion").resume()
        await eventually(lambda: handled == ["first", "second", "third"], PATIENT)
    assert await marks() == []
    assert ahead == [Mark(1, 1), Mark(2, 2), None]
