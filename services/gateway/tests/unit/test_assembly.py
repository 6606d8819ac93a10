"""The order of a generation's replies."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.contracts.errors import Problem
from tessera.contracts.events import GenerationChunk, GenerationCompleted, GenerationFailed, Usage
from tessera.gateway.domain.assembly import Assembly, Located

pytestmark = pytest.mark.unit

USAGE = Usage(prompt_tokens=1, completion_tokens=1, source="counted")


def chunk(index: int, attempt: int = 1, text: str | None = None) -> Located:
    said = text if text is not None else str(index)
    return Located(GenerationChunk(generation_id="g", attempt=attempt, index=index, text_offset=0, text=said), 0, 0)


def completed(last_index: int, attempt: int = 1) -> Located:
    data = GenerationCompleted(
        generation_id="g", attempt=attempt, last_index=last_index, model_id="m", text="", finish_reason="stop", usage=USAGE
    )
    return Located(data, 0, 0)


def failed(last_index: int) -> Located:
    return Located(GenerationFailed(generation_id="g", last_index=last_index, problem=Problem(code="x", message="x")), 0, 0)


def fed(*replies: Located) -> list[Any]:
    assembly = Assembly()
    return [shown.data for reply in replies for shown in assembly.feed(reply)]


@settings(deadline=None)
@given(st.data(), st.integers(min_value=0, max_value=12))
def test_each_index_is_shown_once_in_order_and_then_the_end(data: st.DataObject, count: int) -> None:
    replies = [*(chunk(index) for index in range(count)), completed(count - 1)]
    repeats = data.draw(st.lists(st.sampled_from(replies), max_size=10))
    order = data.draw(st.permutations([*replies, *repeats]))
    shown = fed(*order)
    assert [part.index for part in shown[:-1]] == list(range(count))
    assert isinstance(shown[-1], GenerationCompleted)


def test_an_ending_waits_for_the_last_chunk_that_it_names() -> None:
    assembly = Assembly()
    assert [*assembly.feed(completed(1)), *assembly.feed(chunk(1))] == []
    assert len(assembly.feed(chunk(0))) == 3
    assert assembly.finished


def test_a_higher_attempt_goes_on_where_the_lower_one_ended() -> None:
    shown = fed(
        chunk(0),
        chunk(2, text="lost"),
        chunk(1, attempt=2),
        chunk(0, attempt=2),
        chunk(2, text="late"),
        chunk(2, attempt=2),
        completed(2, 2),
    )
    assert [part.text for part in shown[:-1]] == ["0", "1", "2"]


def test_nothing_follows_an_ending() -> None:
    assert len(fed(failed(-1), chunk(0), completed(-1))) == 1


def test_a_failure_shows_what_was_sent_before() -> None:
    assert [type(part) for part in fed(failed(0), chunk(0))] == [GenerationChunk, GenerationFailed]
