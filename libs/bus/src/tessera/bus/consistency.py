"""Whether what a reader waits for is visible: one pure decision over what one database snapshot shows (docs/consistency.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from tessera.bus.events import Position
from tessera.contracts.errors import Problem

Partition = tuple[str, int]
"""Topic in the catalogue's spelling, and partition."""

NOT_APPLIED: Final = "not_applied"
_ENDED: Final = frozenset({"refused", "dead"})
"""States of parked rows after which nothing more happens by itself. Every other state, known or not, may still have its effect."""
_STUCK: Final = "stuck"


class Standing(Enum):
    """What can be said of that which a reader waits for; of several the worst, which is the first here."""

    REFUSED = "refused"
    """It will never be visible, unless an operator replays it."""
    PENDING = "pending"
    """It was read, could not be applied yet, and is kept to be tried again."""
    BEHIND = "behind"
    """It was not read yet."""
    SATISFIED = "satisfied"
    """Its effect is in the snapshot."""


@dataclass(frozen=True, slots=True)
class Write:
    """One event, known by its identity and body (16 bytes each) and, where its producer was told, its place in the log."""

    identity: bytes
    body: bytes
    place: Position | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What a reader waits for: these events, and everything below these offsets."""

    writes: Sequence[Write] = ()
    ends: Mapping[Partition, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParkedEvent:
    """A row of `parked`: an event that came and was not applied."""

    place: Position
    state: str
    code: str
    message: str = ""
    identity: bytes | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What one snapshot shows of a consumer, as far as it concerns a target."""

    positions: Mapping[Partition, int] = field(default_factory=dict)
    """The next offset to handle; a partition that was never read has none."""
    parked: Sequence[ParkedEvent] = ()
    inbox: Mapping[bytes, bytes] = field(default_factory=dict)
    """Identity to body digest of the events that were applied."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The decision. `reason` says why something is refused or pending."""

    standing: Standing
    reason: Problem | None = None
    waiting_may_help: bool = True
    """False where only an operator can change it."""


SATISFIED: Final = Judgement(Standing.SATISFIED, waiting_may_help=False)
_BEHIND: Final = Judgement(Standing.BEHIND)


def judge(target: Target, seen: Seen) -> Judgement:
    """Whether all of `target` is in the snapshot that shows `seen`; else the worst of what is missing.

    Satisfied is said only where the effects are in that very snapshot, or were replaced there by later ones. Never blocks.
    """
    judgements = [_of_write(write, seen) for write in target.writes] + [_of_end(*end, seen) for end in target.ends.items()]
    return min(judgements, key=_severity, default=SATISFIED)


def reached(seen: Seen) -> dict[Partition, int]:
    """How far each partition is done for good: below it every event was applied or refused. A target made of it is satisfied by `seen`."""
    live = [parked.place for parked in seen.parked if parked.state not in _ENDED]
    return {
        (topic, partition): min([position, *(place.offset for place in live if place[:2] == (topic, partition))])
        for (topic, partition), position in seen.positions.items()
    }


def _of_write(write: Write, seen: Seen) -> Judgement:
    """Rows that may still have an effect come first: a copy of an event may wait while the inbox knows it already."""
    rows = [parked for parked in seen.parked if parked.identity == write.identity or parked.place == write.place]
    live = [parked for parked in rows if parked.state not in _ENDED]
    if live:
        return _pending(live)
    applied = seen.inbox.get(write.identity)
    if applied == write.body:
        return SATISFIED
    if applied is not None:
        return _refused("event_id_reused", "Another event with the same id was applied; this one had another body.")
    own = [parked for parked in rows if write.place is None or parked.place == write.place]
    if own:
        return _refused(own[-1].code, own[-1].message)
    if write.place is not None and seen.positions.get(write.place[:2], 0) > write.place.offset:
        return _refused(NOT_APPLIED, "The event was read and had no effect; why is no longer known.")
    return _BEHIND


def _of_end(partition: Partition, end: int, seen: Seen) -> Judgement:
    """What was refused has no effect to wait for."""
    live = [parked for parked in seen.parked if parked.state not in _ENDED and parked.place[:2] == partition and parked.place.offset < end]
    if live:
        return _pending(live)
    return SATISFIED if seen.positions.get(partition, 0) >= end else _BEHIND


def _pending(live: Iterable[ParkedEvent]) -> Judgement:
    """Of several the one that will not go on by itself."""
    first = max(live, key=lambda parked: parked.state == _STUCK)
    return Judgement(Standing.PENDING, Problem(code=first.code, message=first.message), waiting_may_help=first.state != _STUCK)


def _refused(code: str, message: str) -> Judgement:
    return Judgement(Standing.REFUSED, Problem(code=code, message=message), waiting_may_help=False)


def _severity(judgement: Judgement) -> tuple[int, bool]:
    return list(Standing).index(judgement.standing), judgement.waiting_may_help
