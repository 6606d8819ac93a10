"""Event streams parse the same wherever the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.generator.domain.sse import MAXIMUM_EVENT_BYTES, EventStreamParser, OversizedEventError

pytestmark = pytest.mark.unit

data = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=3)


def parsed(stream: bytes, cuts: list[int]) -> list[bytes]:
    parser, events, start = EventStreamParser(), [], 0
    for cut in [*sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]:
        events += parser.feed(stream[start:cut])
        start = cut
    return events + parser.finish()


@given(st.lists(data, max_size=5), st.sampled_from(["\n", "\r", "\r\n"]), st.lists(st.integers(0, 500), max_size=8), st.booleans())
def test_cuts_and_line_endings_change_nothing(events: list[list[str]], ending: str, cuts: list[int], mark: bool) -> None:
    lines = [f"data: {line}" for event in events for line in event]
    stream = "".join("".join(f"data: {line}{ending}" for line in event) + ending for event in events)
    assert len(lines) >= len(events)
    found = parsed(("\ufeff" if mark else "").encode() + stream.encode(), cuts)
    assert found == ["\n".join(event).encode() for event in events]


def test_comments_other_fields_and_missing_space() -> None:
    assert parsed(b": ping\nevent: delta\nid: 3\ndata:{}\nretry: 1\n\n:\n\n", []) == [b"{}"]


def test_a_forgotten_last_blank_line_loses_nothing() -> None:
    assert parsed(b"data: [DONE]", []) == [b"[DONE]"]


def test_an_endless_event_is_refused() -> None:
    parser = EventStreamParser()
    with pytest.raises(OversizedEventError):
        parser.feed(b"data: " + b"x" * (MAXIMUM_EVENT_BYTES + 1))
