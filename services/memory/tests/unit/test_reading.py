"""What a read that must be fresh is told, look by look."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tessera.bus.consistency import ParkedEvent, Seen, Target, Write
from tessera.bus.events import Position
from tessera.contracts.events import AwaitedWrite, LogEnd, LogPlace, ReadConsistency
from tessera.memory.domain.freshness import Indexing
from tessera.memory.handlers.reading import Reading, not_fresh, target_of

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 27, tzinfo=UTC)
NAME, BODY = b"n" * 16, b"b" * 16
KEY = ("ingest.acme", 0)
WRITE = Target([Write(NAME, BODY)])
END = Target(ends={KEY: 6})
APPLIED = Seen({KEY: 6}, (), {NAME: BODY})
NOTHING_LEFT = Indexing()
WORDS_LEFT = Indexing(frozenset({"words", "vectors"}), {"words": 1, "vectors": 2}, {"words": 1, "vectors": 2})
VECTORS_LEFT = Indexing(frozenset({"vectors"}), {"vectors": 2}, {"vectors": 2})


@pytest.mark.parametrize("target", [WRITE, END])
@pytest.mark.parametrize(
    ("stage", "indexing", "standing", "searchable"),
    [
        ("words", WORDS_LEFT, "behind", None),
        ("words", VECTORS_LEFT, "satisfied", "words"),
        ("words", NOTHING_LEFT, "satisfied", "vectors"),
        ("vectors", VECTORS_LEFT, "behind", "words"),
        ("vectors", NOTHING_LEFT, "satisfied", "vectors"),
        (None, WORDS_LEFT, "satisfied", None),
    ],
)
def test_applied_is_not_found(target: Target, stage: None, indexing: Indexing, standing: str, searchable: str | None) -> None:
    freshness = Reading(target, stage).freshness(APPLIED, indexing, NOW)
    assert (freshness.standing, freshness.searchable) == (standing, searchable)


def test_an_event_waits_for_its_own_memories_and_not_for_those_of_others() -> None:
    others = Indexing(frozenset(), {"words": 1}, {"words": 9})
    assert Reading(WRITE).freshness(APPLIED, others, NOW).standing == "satisfied"
    assert Reading(END).freshness(APPLIED, others, NOW).standing == "behind"


def test_index_work_that_is_asked_for_later_is_not_waited_for() -> None:
    reading = Reading(END)
    looks = [({"words": 3}, {"words": 7}), ({"words": 7}, {"words": 12}), ({"words": 8}, {"words": 20})]
    told = [reading.freshness(APPLIED, Indexing(frozenset(), oldest, newest), NOW).standing for oldest, newest in looks]  # type: ignore[arg-type]
    assert told == ["behind", "behind", "satisfied"]


def test_the_horizon_is_set_when_the_end_was_reached_and_not_before() -> None:
    reading = Reading(END)
    assert reading.freshness(Seen({KEY: 5}), NOTHING_LEFT, NOW).standing == "behind"
    assert reading.freshness(APPLIED, Indexing(frozenset(), {"words": 4}, {"words": 4}), NOW).standing == "behind"


def test_what_is_parked_or_refused_is_told_with_the_reason_and_how_far_everything_is() -> None:
    row = ParkedEvent(Position(*KEY, 4), "stuck", "dependency_unavailable", "away", NAME)
    freshness = Reading(WRITE).freshness(Seen({KEY: 6}, [row]), NOTHING_LEFT, NOW)
    assert (freshness.standing, freshness.waiting_may_help) == ("pending", False)
    assert freshness.reason is not None
    assert freshness.reason.code == "dependency_unavailable"
    assert freshness.ends == (LogEnd(topic="ingest.acme", partition=0, next_offset=4),)
    assert not_fresh(freshness).code == "write_pending"


def test_whoever_asks_again_is_told_what_was_waited_for() -> None:
    end = LogEnd(topic="ingest.acme", partition=0, next_offset=6)
    for seen in (Seen({KEY: 5}), APPLIED):
        assert Reading(END).freshness(seen, WORDS_LEFT, NOW).awaited == (end,)


def test_nobody_waits_for_another_tenants_topic() -> None:
    place = LogPlace(topic="ingest.acme", partition=0, offset=3)
    write = AwaitedWrite(identity=NAME.hex(), body=BODY.hex(), place=place)
    ends = tuple(LogEnd(topic=topic, partition=0, next_offset=9) for topic in ("ingest", "ingest.acme", "ingest.other"))
    target = target_of(ReadConsistency(level="strong", writes=(write,), ends=ends), "acme", {KEY: 11})
    assert target == Target([Write(NAME, BODY, Position(*KEY, 3))], {("ingest", 0): 9, KEY: 11})
