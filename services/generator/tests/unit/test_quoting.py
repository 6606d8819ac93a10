"""The quote engine says only what memory holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.generator.domain.quoting import MAXIMUM_QUOTES, Source, quotes, split_sentences, terms

pytestmark = pytest.mark.unit

SOURCES = [
    Source("m1", "We met in Lisbon. The spare key is under the blue flower pot! Bring bread."),
    Source("m2", "The flower market opens on Saturdays."),
    Source("m3", "我的猫喜欢吃鱼。它叫小白。"),
]


def test_the_best_sentence_comes_first_with_its_source() -> None:
    found = quotes("Where is the spare key?", SOURCES)
    assert str(found[0]) == "“The spare key is under the blue flower pot!” [memory:m1]"


def test_nothing_shared_is_nothing_said() -> None:
    assert quotes("Who won the football match?", SOURCES) == []
    assert quotes("", SOURCES) == []
    assert quotes("Where is the key?", []) == []


def test_function_words_alone_are_no_match() -> None:
    assert quotes("What is it that they are on?", SOURCES) == []


def test_scripts_without_spaces() -> None:
    assert quotes("猫吃什么?", SOURCES)[0].sentence == "我的猫喜欢吃鱼。"


def test_plural_and_possessive_meet_the_word() -> None:
    assert quotes("Which flowers' pots?", SOURCES)[0].memory_id == "m1"


def test_the_same_sentence_is_quoted_once() -> None:
    assert len(quotes("the key", [Source("a", "The key."), Source("b", "The key.")])) == 1


@given(st.text(max_size=60), st.lists(st.text(max_size=120), max_size=5))
def test_every_quote_is_verbatim_and_shares_a_term(question: str, texts: list[str]) -> None:
    sources = [Source(str(number), text) for number, text in enumerate(texts)]
    found = quotes(question, sources)
    assert len(found) <= MAXIMUM_QUOTES
    for quote in found:
        assert quote.sentence in texts[int(quote.memory_id)]
        assert terms(quote.sentence) & terms(question)


@given(st.text(max_size=200))
def test_sentences_are_parts_of_the_text_in_order(text: str) -> None:
    position = 0
    for sentence in split_sentences(text):
        position = text.index(sentence, position) + len(sentence)
