"""The order in which spooled events are handed over."""

from collections import defaultdict
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.gateway.domain.backlog import Backlog, Place, Waiting

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def waiting(number: int, key: str = "k", tenant: str = "acme") -> Waiting:
    return Waiting(Place("segment", number, 1), key.encode(), tenant, f"e-{number}", "t", NOW + timedelta(seconds=number))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abc")),
        st.tuples(st.just("take"), st.integers(1, 3)),
        st.tuples(st.just("done"), st.integers(0, 5)),
        st.tuples(st.just("failed"), st.integers(0, 5)),
    ),
    max_size=60,
)


@given(steps)
def test_within_a_key_one_is_on_its_way_and_all_leave_in_the_order_in_which_they_came(script: list[tuple[str, object]]) -> None:
    backlog, on_their_way, came, left = Backlog(), list[Waiting](), defaultdict[bytes, list[str]](list), defaultdict[bytes, list[str]](list)
    for number, (step, value) in enumerate(script):
        if step == "add":
            added = waiting(number, str(value))
            backlog.add(added)
            came[added.key].append(added.event_id)
        elif step == "take":
            assert isinstance(value, int)
            on_their_way += (taken := backlog.take(value, 0))
            assert len(taken) <= value
        elif on_their_way and isinstance(value, int):
            one = on_their_way.pop(value % len(on_their_way))
            if step == "done":
                backlog.done(one)
                left[one.key].append(one.event_id)
            else:
                backlog.failed(one, "away", -1)
        assert len({one.key for one in on_their_way}) == len(on_their_way)
        assert all(backlog.holds(key) == (len(came[key]) > len(left[key])) for key in came)
    for one in on_their_way:
        backlog.failed(one, "away", -1)
    while taken := backlog.take(10, 0):
        for one in taken:
            backlog.done(one)
            left[one.key].append(one.event_id)
    assert (left, len(backlog), list(backlog), backlog.oldest) == (came, 0, [], None)


def test_what_failed_rests_and_can_be_woken() -> None:
    backlog = Backlog()
    backlog.add(waiting(1))
    (first,) = backlog.take(1, 0)
    backlog.failed(first, "away", 5)
    assert (backlog.take(1, 4.9), first.attempts, first.last_error) == ([], 1, "away")
    assert backlog.wake({"unknown"}) == []
    assert backlog.wake({"e-1"}) == [first]
    assert backlog.take(1, 0) == [first]


def test_an_id_is_known_for_its_tenant_until_its_last_record_is_done() -> None:
    backlog = Backlog()
    for _ in range(2):
        backlog.add(waiting(1))
    assert (backlog.knows("acme", "e-1"), backlog.knows("other", "e-1")) == (True, False)
    for expected in (True, False):
        backlog.done(backlog.take(1, 0)[0])
        assert backlog.knows("acme", "e-1") is expected


def test_only_the_first_of_a_key_can_be_done() -> None:
    backlog = Backlog()
    backlog.add(waiting(1))
    backlog.add(second := waiting(2))
    assert backlog.oldest == NOW + timedelta(seconds=1)
    with pytest.raises(ValueError, match="first"):
        backlog.done(second)
