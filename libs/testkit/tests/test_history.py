"""The checker finds each anomaly, and only that one."""

import random

import pytest

from tessera.testkit.history import Findings, History, Outgoing, Sent, assert_clean, check

SENT = [Sent("a1", "a"), Sent("b1", "b"), Sent("a2", "a"), Sent("b2", "b"), Sent("a3", "a")]
IDS = [event.id for event in SENT]


def told(*causes: str) -> list[Outgoing]:
    return [Outgoing(f"out-{cause}", cause) for cause in causes]


def history(**changes: object) -> History:
    whole = {"sent": SENT, "acknowledged": IDS, "effects": IDS, "outgoing": told(*IDS)}
    return History(**{**whole, **changes})  # type: ignore[arg-type]


def anomalies(found: Findings) -> dict[str, int]:
    return {name: count for name, count in found.counts().items() if count}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"effects": ["b1", "b2", "a1", "a2", "a3"], "outgoing": told("a1", "a2", "b1", "a3", "b2")},
        {"outgoing": told("a1", "a2", "a1", "a2", "a3", "b1", "b2", "b1")},
        {"effects": IDS[:-1], "outgoing": told(*IDS[:-1]), "refused": ["a3"]},
        {"effects": IDS[:-1], "outgoing": told(*IDS[:-1]), "acknowledged": IDS[:-1]},
        {"sent": [*SENT, *SENT[::-1]]},
        {"outgoing": None},
        {"effects": IDS[::-1], "outgoing": told(*IDS[::-1]), "ordered": False},
        {"outgoing": told(*IDS[::-1]), "outgoing_ordered": False},
        {"effects": IDS[::-1], "effects_ordered": False},
    ],
    ids=[
        "plain",
        "keys interleaved",
        "repeated on the wire",
        "refused",
        "unacknowledged",
        "sent twice",
        "silent",
        "free",
        "apart",
        "stored apart",
    ],
)
def test_a_good_history_is_clean(changes: dict[str, object]) -> None:
    assert_clean(history(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"effects": IDS[1:], "outgoing": told(*IDS[1:])}, {"lost": 1}),
        ({"outgoing": told(*IDS[1:])}, {"lost": 1}),
        ({"effects": [*IDS, "a2"]}, {"doubled": 1}),
        ({"outgoing": [*told(*IDS), Outgoing("other", "a1")]}, {"doubled": 1}),
        ({"outgoing": [*told(*IDS), Outgoing("out-a1", "a1", "other content")]}, {"doubled": 1}),
        ({"effects": ["a2", "a1", "b1", "b2", "a3"]}, {"reordered": 1}),
        ({"outgoing": told("a1", "b2", "b1", "a2", "a3")}, {"reordered": 1}),
        ({"effects": [*IDS, "unknown"], "outgoing": told(*IDS, "unknown")}, {"aborted": 1}),
        ({"refused": ["a1"]}, {"aborted": 1}),
        ({"acknowledged": IDS[:-1], "effects": IDS[:-1]}, {"aborted": 1}),
        ({"unfinished": ["ingest/0 lags by 3"]}, {"stuck": 1}),
    ],
)
def test_each_anomaly_is_found_as_itself(changes: dict[str, object], expected: dict[str, int]) -> None:
    found = check(history(**changes))
    assert anomalies(found) == expected
    assert not found.clean


def test_one_event_that_came_late_is_one_inversion() -> None:
    sent = [Sent(str(number), "k") for number in range(5)]
    ids = ["1", "2", "3", "4", "0"]
    assert anomalies(check(History(sent=sent, acknowledged=ids, effects=ids))) == {"reordered": 1}


def test_any_single_change_of_a_long_history_is_found() -> None:
    chance = random.Random(7)
    sent = [Sent(str(number), str(number % 5)) for number in range(200)]
    ids = [event.id for event in sent]
    for _ in range(50):
        place = chance.randrange(200)
        lost, doubled = [*ids[:place], *ids[place + 1 :]], [*ids, ids[place]]
        assert anomalies(check(History(sent=sent, acknowledged=ids, effects=lost))) == {"lost": 1}
        assert anomalies(check(History(sent=sent, acknowledged=ids, effects=doubled))) == {"doubled": 1}


def test_what_is_found_is_named_and_a_long_list_is_cut() -> None:
    found = check(History(sent=[Sent("x", "k")], acknowledged=[f"gone-{number}" for number in range(25)]))
    lines = str(found).splitlines()
    assert lines[0] == "lost: gone-0 was acknowledged and has no effect"
    assert lines[-1] == "lost: and 15 more"
    with pytest.raises(AssertionError, match="gone-0"):
        assert_clean(History(acknowledged=["gone-0"]))
