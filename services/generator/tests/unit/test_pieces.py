"""Pieces merge as the published clients merge deltas, and coalesce in time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.generator.domain.pieces import Coalescer, Said, merged

pytestmark = pytest.mark.unit


def test_tool_calls_are_joined_by_index() -> None:
    first = {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x'}}]}
    second = {"tool_calls": [{"index": 0, "function": {"arguments": '": 1}'}}, {"index": 1, "id": "b"}]}
    assert merged(first, second) == {
        "tool_calls": [
            {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"index": 1, "id": "b"},
        ]
    }


def test_strings_are_joined_and_lists_that_are_repeated_whole_are_not_doubled() -> None:
    first = {"reasoning_content": "Let me ", "citations": ["a"]}
    second = {"reasoning_content": "think.", "citations": ["a", "b"], "refusal": None}
    assert merged(first, second) == {"reasoning_content": "Let me think.", "citations": ["a", "b"], "refusal": None}


def test_log_probabilities_are_continued_even_where_they_are_equal() -> None:
    part = {"logprobs": {"content": [{"token": "a", "logprob": -1.0}]}}
    assert merged(part, part) == {"logprobs": {"content": [{"token": "a", "logprob": -1.0}] * 2}}


def test_a_value_of_another_kind_replaces() -> None:
    assert merged({"timings": 1.0}, {"timings": {"ms": 2}}) == {"timings": {"ms": 2}}


def test_the_first_piece_is_due_at_once_and_later_ones_after_the_interval() -> None:
    coalescer = Coalescer(0.05)
    assert coalescer.wait_seconds(0.0) is None
    coalescer.add(Said("a"))
    assert coalescer.wait_seconds(0.0) == 0
    assert coalescer.take(0.0) == [Said("a", {})]
    coalescer.add(Said("b"))
    assert coalescer.wait_seconds(0.02) == pytest.approx(0.03)
    coalescer.add(Said("c", {"role": "assistant"}))
    assert coalescer.wait_seconds(0.07) == 0
    assert coalescer.take(0.07) == [Said("bc", {"role": "assistant"})]
    assert coalescer.empty


def test_choices_are_collected_apart() -> None:
    coalescer = Coalescer(0.05)
    for said in (Said("b", choice=1), Said("a"), Said("B", {"refusal": "x"}, 1), Said(choice=2)):
        coalescer.add(said)
    assert coalescer.take(0.0) == [Said("a", {}), Said("bB", {"refusal": "x"}, 1)]


@given(st.lists(st.tuples(st.text(max_size=4), st.floats(0, 0.1)), max_size=30))
def test_nothing_is_lost_and_takes_keep_their_distance(arrivals: list[tuple[str, float]]) -> None:
    coalescer, now, taken, times = Coalescer(0.05), 0.0, "", []
    for text, pause in arrivals:
        now += pause
        coalescer.add(Said(text))
        if coalescer.wait_seconds(now) == 0:
            taken += "".join(said.text for said in coalescer.take(now))
            times.append(now)
    taken += "".join(said.text for said in coalescer.take(now))
    assert taken == "".join(text for text, _ in arrivals)
    assert all(later - earlier >= 0.05 - 1e-9 for earlier, later in pairwise(times))
