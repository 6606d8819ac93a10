"""Bugs planted on purpose, to see that the simulation finds them. Each is a context manager; nothing here is in production code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final
from unittest.mock import patch

from simulation import statements
from simulation.postgres import Result, Session, Values

from tessera.bus import consistency, positions, relay
from tessera.bus.parked import ParkedIndex, ParkedRows
from tessera.bus.positions import PositionRow
from tessera.bus.publisher import Publisher
from tessera.bus.tracking import OffsetHead
from tessera.bus.transactional import TransactionalLoop

_SHARED: Final = (positions._ADVANCE_ALL, positions._ADVANCE_ALL_AND_PUBLISH)

Bug = Callable[[], AbstractContextManager[Any]]


@contextmanager
def commit_before_effect() -> Iterator[None]:
    """The position is committed in a transaction of its own before the handlers run."""
    attempt, advance = TransactionalLoop._attempt, PositionRow.advance

    async def early(loop: Any, batch: Any, **more: Any) -> Any:
        async with loop._workshop.database.transaction() as connection:
            await advance(loop._row, connection, loop._position, batch[-1].offset + 1)
        return await attempt(loop, batch, **more)

    async def late(*_: Any) -> None:
        """Done already."""

    with patch.object(TransactionalLoop, "_attempt", early), patch.object(PositionRow, "advance", late):
        yield


@contextmanager
def finished_when_taken() -> Iterator[None]:
    """The offset of a request is committed before the request is answered."""
    take = OffsetHead.take

    def early(head: OffsetHead, offset: int) -> None:
        take(head, offset)
        head.finish(offset)

    with patch.object(OffsetHead, "take", early):
        yield


@contextmanager
def no_fence() -> Iterator[None]:
    """Whoever believes to have the partition moves its position."""
    with _unfenced(positions._ADVANCE, positions._ADVANCE_AND_MARK, positions._SET_MARK, positions._SET_MARKS, *_SHARED):
        yield


@contextmanager
def no_fence_when_shared() -> Iterator[None]:
    """The statement that moves several positions moves each of them, wherever it is."""
    with _unfenced(*_SHARED):
        yield


@contextmanager
def _unfenced(*fenced: Any) -> Iterator[None]:
    def anyhow(function: Callable[[Session, Values], Result]) -> Callable[[Session, Values], Result]:
        return lambda session, values: function(session, {**values, "stored": _stored(session, values)})

    unfenced = {statement: anyhow(statements.STATEMENTS[statement]) for statement in fenced}
    with patch.object(statements, "STATEMENTS", {**statements.STATEMENTS, **unfenced}):
        yield


def _stored(session: Session, values: Values) -> Any:
    """Where the position is, or the positions are, whatever the statement expects."""
    if "on_topics" in values:
        places = zip(values["on_topics"], values["on_partitions"], strict=True)
        return [_stored(session, {"consumer": values["consumer"], "topic": topic, "partition": number}) for topic, number in places]
    return session.get("consumer_position", (values["consumer"], values["topic"], values["partition"])).next_offset  # type: ignore[union-attr]


@contextmanager
def relay_out_of_order() -> Iterator[None]:
    """The relay reads the newest rows first."""

    def newest_first(session: Session, values: Values) -> Result:
        return Result(statements.delete_and_read_outbox(session, {**values, "rows": 1_000_000}).all()[::-1][: values["rows"]])

    with patch.object(statements, "STATEMENTS", {**statements.STATEMENTS, relay._DELETE_AND_READ: newest_first}):
        yield


@contextmanager
def producer_with_a_gap() -> Iterator[None]:
    """A producer whose record was refused goes on, although the broker takes nothing more of the partition from it."""
    with patch.object(Publisher, "_outcome", lambda *_: None):
        yield


@contextmanager
def token_too_early() -> Iterator[None]:
    """A reader is told that a write is visible one event before it is, whatever is parked."""
    judge = consistency.judge

    def early(target: Any, seen: consistency.Seen) -> consistency.Judgement:
        ahead = {partition: position + 1 for partition, position in seen.positions.items()}
        return judge(target, replace(seen, positions=ahead, parked=()))

    with patch.object(consistency, "judge", early):
        yield


@contextmanager
def lost_retry() -> Iterator[None]:
    """A parked event that fails again is forgotten."""

    async def forget(rows: ParkedRows, connection: Any, begun: Any, failed: Any) -> bool:
        return await ParkedRows.end(rows, connection, begun)

    with patch.object(ParkedRows, "postpone", forget):
        yield


@contextmanager
def key_overtaken() -> Iterator[None]:
    """Later events of a key do not wait for the one that is parked."""
    with patch.object(ParkedIndex, "blocks", lambda *_: False):
        yield


BUGS: Final[Mapping[str, Bug]] = MappingProxyType(
    {
        "commit before effect": commit_before_effect,
        "finished when taken": finished_when_taken,
        "no fence": no_fence,
        "no fence when shared": no_fence_when_shared,
        "relay out of order": relay_out_of_order,
        "producer with a gap": producer_with_a_gap,
        "token too early": token_too_early,
        "lost retry": lost_retry,
        "key overtaken": key_overtaken,
    }
)
