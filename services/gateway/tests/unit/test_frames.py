"""Server-sent events."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.gateway.domain.frames import FrameId, data_frame, encode_json

pytestmark = pytest.mark.unit

numbers = st.integers(min_value=0, max_value=2**63)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.text(min_size=1), numbers, numbers, numbers)
def test_an_id_survives_being_sent_and_returned(generation: str, partition: int, offset: int, frame: int) -> None:
    frame_id = FrameId(generation, partition, offset, frame)
    assert FrameId.parse(str(frame_id)) == frame_id


@pytest.mark.parametrize("text", ["", "a", "a.1.2", ".1.2.3", "a.1.2.x", "a.-1.2.3", "a.1..3", "a.1.2.³"])
def test_what_is_no_id(text: str) -> None:
    assert FrameId.parse(text) is None


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=3))
def test_a_frame_is_one_data_line_whatever_it_carries(value: dict[str, object]) -> None:
    frame = data_frame(value, FrameId("g", 1, 2, 3))
    head, data, *rest = frame.split(b"\n")
    assert head == b"id: g.1.2.3"
    assert rest == [b"", b""]
    assert json.loads(data.removeprefix(b"data: ")) == json.loads(json.dumps(value))


def test_lone_surrogates_do_not_break_the_encoding() -> None:
    assert encode_json({"a": "\ud800é"}) == b'{"a":"\\ud800\\u00e9"}'
