"""The decision whether a token is satisfied, against a model of a consumer whose every commit is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus.consistency import NOT_APPLIED, ParkedEvent, Seen, Standing, Target, Write, judge, reached
from tessera.bus.events import Position

TOPIC, PARTITION = "ingest.acme", 3
KEY = (TOPIC, PARTITION)


def digest(name: str) -> bytes:
    return name.encode().ljust(16, b".")


def place(offset: int, topic: str = TOPIC, partition: int = PARTITION) -> Position:
    return Position(topic, partition, offset)


def write(name: str = "a", body: str = "1", offset: int | None = 5) -> Write:
    return Write(digest(name), digest(body), None if offset is None else place(offset))


def parked(state: str, offset: int = 5, name: str | None = "a") -> ParkedEvent:
    return ParkedEvent(place(offset), state, f"{state}_code", "why", None if name is None else digest(name))


def standing(target: Target, seen: Seen) -> Standing:
    return judge(target, seen).standing


ONE = Target([write()])
APPLIED = Seen({KEY: 6}, (), {digest("a"): digest("1")})


def test_nothing_to_wait_for_is_satisfied() -> None:
    assert standing(Target(), Seen()) is Standing.SATISFIED


def test_a_write_is_satisfied_by_its_row_in_the_inbox_alone() -> None:
    assert standing(ONE, APPLIED) is Standing.SATISFIED
    assert standing(Target([write(offset=None)]), APPLIED) is Standing.SATISFIED
    assert standing(ONE, Seen({KEY: 5})) is Standing.BEHIND
    assert standing(Target([write(offset=None)]), Seen({KEY: 900})) is Standing.BEHIND


def test_another_body_under_the_same_id_is_refused() -> None:
    judgement = judge(Target([write(body="2")]), APPLIED)
    assert (judgement.standing, judgement.reason and judgement.reason.code) == (Standing.REFUSED, "event_id_reused")


@pytest.mark.parametrize("state", ["waiting", "stuck", "delayed", "unheard_of"])
def test_a_parked_write_is_pending_even_where_the_inbox_knows_a_copy(state: str) -> None:
    for seen in (Seen({KEY: 6}, [parked(state)]), replace(APPLIED, parked=[parked(state, offset=9)])):
        judgement = judge(ONE, seen)
        assert judgement.standing is Standing.PENDING
        assert judgement.reason is not None
        assert judgement.reason.code == f"{state}_code"
        assert judgement.waiting_may_help is (state != "stuck")


@pytest.mark.parametrize("state", ["refused", "dead"])
def test_a_refused_write_says_why_until_a_replay_applies_it(state: str) -> None:
    judgement = judge(ONE, Seen({KEY: 6}, [parked(state)]))
    assert judgement.standing is Standing.REFUSED
    assert judgement.reason is not None
    assert judgement.reason.code == f"{state}_code"
    assert not judgement.waiting_may_help
    assert standing(ONE, replace(APPLIED, parked=[parked(state)])) is Standing.SATISFIED


def test_what_became_of_an_earlier_event_with_the_same_id_is_not_told_of_a_later_one() -> None:
    later = Target([write(offset=8)])
    assert standing(later, Seen({KEY: 6}, [parked("refused", offset=5)])) is Standing.BEHIND


def test_a_write_that_was_passed_over_without_a_trace_is_refused_and_not_waited_for() -> None:
    judgement = judge(ONE, Seen({KEY: 6}))
    assert (judgement.standing, judgement.reason and judgement.reason.code) == (Standing.REFUSED, NOT_APPLIED)


def test_ends_are_satisfied_by_the_position_unless_something_below_is_parked() -> None:
    target = Target(ends={KEY: 6})
    assert standing(target, Seen({KEY: 6})) is Standing.SATISFIED
    assert standing(target, Seen({KEY: 5})) is Standing.BEHIND
    assert standing(target, Seen()) is Standing.BEHIND
    assert standing(Target(ends={KEY: 0}), Seen()) is Standing.SATISFIED
    assert standing(target, Seen({KEY: 9}, [parked("waiting", 5)])) is Standing.PENDING
    assert standing(target, Seen({KEY: 9}, [parked("waiting", 6)])) is Standing.SATISFIED
    assert standing(target, Seen({KEY: 9}, [parked("refused", 5)])) is Standing.SATISFIED
    elsewhere = ParkedEvent(place(1, partition=4), "stuck", "code")
    assert standing(target, Seen({KEY: 9}, [elsewhere])) is Standing.SATISFIED


def test_of_several_the_worst_is_said() -> None:
    seen = Seen({KEY: 9}, [parked("stuck", 5, "stuck"), parked("waiting", 6, "waiting"), parked("refused", 7, "refused")], APPLIED.inbox)
    known = {"stuck": 5, "waiting": 6, "refused": 7, "a": 4, "later": 9}
    for names, expected in (
        (("a",), Standing.SATISFIED),
        (("a", "later"), Standing.BEHIND),
        (("a", "later", "waiting"), Standing.PENDING),
        (("a", "later", "waiting", "refused"), Standing.REFUSED),
    ):
        assert standing(Target([write(name, offset=known[name]) for name in names]), seen) is expected
    assert not judge(Target([write("waiting", offset=6), write("stuck", offset=5)]), seen).waiting_may_help


def test_an_answer_is_as_far_as_everything_below_is_done_for_good() -> None:
    seen = Seen({KEY: 9, (TOPIC, 4): 7}, [parked("waiting", 6), parked("stuck", 5), parked("refused", 2)])
    assert reached(seen) == {KEY: 5, (TOPIC, 4): 7}
    assert standing(Target(ends=reached(seen)), seen) is Standing.SATISFIED


# --- every interleaving of a small consumer -------------------------------------------------------

Event = tuple[str, str]
"""Identity and body."""


@dataclass
class Model:
    """A transactional consumer of one partition: what each commit leaves in its tables, and which effects it made visible."""

    log: list[Event]
    position: int = 0
    parked: dict[int, str] = field(default_factory=dict)
    inbox: dict[str, str] = field(default_factory=dict)
    effects: set[Event] = field(default_factory=set)

    def read(self, outcome: str) -> None:
        """The next event: applied, refused, or parked in a state."""
        if self.position == len(self.log):
            return
        if outcome == "applied":
            self._apply(self.position)
        else:
            self.parked[self.position] = outcome
        self.position += 1

    def settle(self, outcome: str) -> None:
        """The first parked event: applied after all, or refused."""
        live = [offset for offset, state in self.parked.items() if state in ("waiting", "stuck", "delayed")]
        if live and outcome == "applied":
            del self.parked[live[0]]
            self._apply(live[0])
        elif live:
            self.parked[live[0]] = "dead"

    def _apply(self, offset: int) -> None:
        name, body = self.log[offset]
        if self.inbox.setdefault(name, body) == body:
            self.effects.add((name, body))
        else:
            self.parked[offset] = "refused"

    @property
    def seen(self) -> Seen:
        rows = [ParkedEvent(place(offset), state, "code", "", digest(self.log[offset][0])) for offset, state in self.parked.items()]
        return Seen({KEY: self.position}, rows, {digest(name): digest(body) for name, body in self.inbox.items()})


EVENTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("12")), min_size=1, max_size=8)
STEPS = st.lists(
    st.tuples(st.just("read"), st.sampled_from(["applied", "waiting", "stuck", "delayed", "refused", "dead"]))
    | st.tuples(st.just("settle"), st.sampled_from(["applied", "dead"])),
    max_size=20,
)


def snapshots(log: list[Event], steps: list[tuple[str, str]]) -> Iterator[Model]:
    model = Model(log)
    yield model
    for step, outcome in steps:
        getattr(model, step)(outcome)
        yield model


@given(EVENTS, STEPS, st.booleans())
def test_never_satisfied_before_the_effect_is_in_the_same_snapshot(log: list[Event], steps: list[tuple[str, str]], placed: bool) -> None:
    for model in snapshots(log, steps):
        for offset, (name, body) in enumerate(log):
            target = Target([write(name, body, offset if placed else None)])
            if standing(target, model.seen) is Standing.SATISFIED:
                assert (name, body) in model.effects


@given(EVENTS, STEPS)
def test_ends_are_never_satisfied_before_everything_below_is_applied_or_refused(log: list[Event], steps: list[tuple[str, str]]) -> None:
    for model in snapshots(log, steps):
        ended = {offset for offset, state in model.parked.items() if state in ("refused", "dead")}
        for end in range(len(log) + 1):
            if standing(Target(ends={KEY: end}), model.seen) is Standing.SATISFIED:
                assert all(event in model.effects or offset in ended for offset, event in enumerate(log[:end]))


@given(EVENTS, STEPS)
def test_what_an_answer_reached_stays_reached(log: list[Event], steps: list[tuple[str, str]]) -> None:
    tokens: list[Target] = []
    for model in snapshots(log, steps):
        tokens.append(Target(ends=reached(model.seen)))
        assert all(standing(token, model.seen) is Standing.SATISFIED for token in tokens)


@given(EVENTS, STEPS)
def test_once_everything_is_read_nobody_waits_for_nothing(log: list[Event], steps: list[tuple[str, str]]) -> None:
    model = list(snapshots(log, steps))[-1]
    while model.position < len(log):
        model.read("applied")
    for offset, (name, body) in enumerate(log):
        assert standing(Target([write(name, body, offset)]), model.seen) is not Standing.BEHIND
