"""Handlers that take neighbours together: the same promises as one by one, with fewer round trips."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from tessera.bus import BatchTransaction, Bus, Received
from tessera.contracts.errors import InvalidError
from tessera.contracts.events import MemoryRecorded, MessagePublished
from tessera.testkit import CloudEventProducer, eventually

pytestmark = pytest.mark.integration

TENANT = {"tenantid": "acme"}
TRACE = "00-{:032x}-00f067aa0ba902b7-01"
_EFFECTS = text(
    "INSERT INTO effect (tenant_id, event_id, content) "
    "SELECT 'acme', event_id, content FROM unnest(CAST(:ids AS text[]), CAST(:contents AS text[])) AS given (event_id, content)"
)


class Handler:
    """The probe's effect for many messages at once; remembers how many it was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def __call__(self, events: Sequence[Received[MessagePublished]], batch: BatchTransaction) -> None:
        self.sizes.append(len(events))
        contents = [str(event.data.content) for event in events]
        await batch.connection.execute(_EFFECTS, {"ids": [event.id for event in events], "contents": contents})
        for event, content in zip(events, contents, strict=True):
            now = datetime.now(UTC)
            recorded = MemoryRecorded(
                memory_id=event.id, kind="message", origin_id=event.id, occurred_at=now, recorded_at=now, importance=0.5, text=content
            )
            await batch.of(event).publish(recorded, step="recorded", key=b"one key")
        if "invalid" in contents:
            raise InvalidError("not_wanted", "This content is not wanted.", "content")


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def batching(probe: Any, handler: Handler) -> Callable[[Bus], None]:
    return lambda bus: probe.register(bus, handler, batched=True)


async def publish(producer: CloudEventProducer, *contents: str) -> None:
    for number, content in enumerate(contents):
        data = MessagePublished(conversation_id="c1", role="user", content=content)
        await producer.publish("ingest", data, id=f"m{number}", partition=0, traceparent=TRACE.format(number + 1), **TENANT)


async def effects(ground: Any) -> list[str]:
    return [row["content"] for row in await ground.rows("SELECT content FROM memory.effect ORDER BY position")]


async def test_neighbours_are_handled_together_in_order_each_in_its_own_trace(
    ground: Any, running: Any, producer: CloudEventProducer, *, reader: Callable[..., Any], batching: Any, handler: Handler
) -> None:
    contents = [str(number) for number in range(20)]
    await publish(producer, *contents)
    async with running(register=batching):
        recorded = await reader("memory.recorded").read(20)
    assert await effects(ground) == contents
    assert [event.data["text"] for event in recorded] == contents
    assert [event.attributes["traceparent"] for event in recorded] == [TRACE.format(number + 1) for number in range(20)]
    assert len(handler.sizes) < 20


async def test_of_many_only_the_culprit_is_refused(
    ground: Any, running: Any, producer: CloudEventProducer, *, reader: Callable[..., Any], batching: Any, handler: Handler
) -> None:
    await publish(producer, "a", "invalid", "b", "c")
    async with running(register=batching):
        recorded = await reader("memory.recorded").read(3)
        (letter,) = await reader("ingest.memory.dlq").read(1)
    assert await effects(ground) == ["a", "b", "c"]
    assert [event.data["text"] for event in recorded] == ["a", "b", "c"]
    assert letter.id == "m1"
    assert handler.sizes[-4:] == [1, 1, 1, 1]


async def test_a_repeat_among_many_has_no_effect(
    ground: Any, running: Any, producer: CloudEventProducer, reader: Callable[..., Any], batching: Any
) -> None:
    await publish(producer, "a", "b")
    await publish(producer, "a", "b", "c")
    async with running(register=batching):
        await reader("memory.recorded").read(3)
        await eventually(lambda: _position(ground, 5))
    assert await effects(ground) == ["a", "b", "c"]


async def _position(ground: Any, offset: int) -> bool:
    rows = await ground.rows("SELECT 1 FROM memory.consumer_position WHERE topic = 'ingest' AND partition = 0 AND next_offset = $1", offset)
    return bool(rows)
