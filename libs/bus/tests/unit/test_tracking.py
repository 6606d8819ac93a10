"""The finished head."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus.tracking import OffsetHead


@given(st.sets(st.integers(0, 200), min_size=1), st.randoms(use_true_random=False))
def test_the_head_is_the_first_unfinished_offset_whatever_the_order(offsets: set[int], random: object) -> None:
    taken = sorted(offsets)
    finishing = list(taken)
    random.shuffle(finishing)  # type: ignore[attr-defined]
    head, unfinished, done = OffsetHead(), set(taken), set[int]()
    for offset in taken:
        head.take(offset)
    for offset in finishing:
        head.finish(offset)
        unfinished.discard(offset)
        done.add(offset)
        below = [taken_offset for taken_offset in taken if taken_offset < min(unfinished, default=10**9)]
        assert head.position == (below[-1] + 1 if below else None)
        assert head.unfinished == len([taken_offset for taken_offset in taken if taken_offset not in below])
    assert head.position == taken[-1] + 1


def test_offsets_must_rise() -> None:
    head = OffsetHead()
    head.take(5)
    with pytest.raises(ValueError, match="offset 5 after 5"):
        head.take(5)
