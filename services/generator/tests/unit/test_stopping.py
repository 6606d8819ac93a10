"""Stop sequences do not depend on how the text was cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.generator.domain.stopping import StopScanner

pytestmark = pytest.mark.unit

alphabet = st.sampled_from("ab\u20ac\U0001f600")
stops = st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=4)


def scanned(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = "".join(map(scanner.feed, pieces))
    return shown + scanner.finish(), scanner.stopped


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the shortest prefix that ends with a stop sequence, without the longest such sequence."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@given(st.lists(st.text(alphabet, max_size=5), max_size=12), stops)
def test_result_depends_on_the_text_alone(pieces: list[str], stops: list[str]) -> None:
    assert scanned(pieces, stops) == expected("".join(pieces), stops)


@given(st.lists(st.text(alphabet, max_size=5), max_size=12), stops)
def test_nothing_shown_is_ever_taken_back(pieces: list[str], stops: list[str]) -> None:
    scanner, shown = StopScanner(stops), ""
    for piece in pieces:
        shown += scanner.feed(piece)
        assert expected("".join(pieces), stops)[0].startswith(shown)


def test_a_beginning_is_held_back_and_shown_at_the_end() -> None:
    scanner = StopScanner(["END"])
    assert scanner.feed("the EN") == "the "
    assert scanner.finish() == "EN"
    assert not scanner.stopped


def test_nothing_comes_after_a_stop() -> None:
    scanner = StopScanner(["\n"])
    assert scanner.feed("one\ntwo") == "one"
    assert scanner.feed("three") == ""
    assert scanner.finish() == ""
