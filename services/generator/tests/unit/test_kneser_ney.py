"""The n-gram model: exact in every order of learning, and a distribution in every context."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.generator.domain.kneser_ney import (
    END,
    FALLBACK_DISCOUNTS,
    ORDER,
    START,
    CountTable,
    Ngram,
    contexts,
    discounts,
    longest_ngrams,
)

pytestmark = pytest.mark.unit

texts = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=14), min_size=1, max_size=12)


def learned(corpus: list[list[int]]) -> CountTable:
    table = CountTable()
    for text in corpus:
        table.learn(text)
    return table


def recount(corpus: list[list[int]]) -> dict[Ngram, int]:
    """Adjusted counts from their definition: occurrences for the highest order and text beginnings, else distinct predecessors."""
    occurrences: Counter[Ngram] = Counter()
    predecessors: dict[Ngram, set[int]] = defaultdict(set)
    for text in corpus:
        sequence = (START, *text, END)
        for end in range(2, len(sequence) + 1):
            for start in range(max(0, end - ORDER), end):
                ngram = sequence[start:end]
                occurrences[ngram] += 1
                if start:
                    predecessors[ngram].add(sequence[start - 1])
    return {ngram: count if len(ngram) == ORDER or ngram[0] == START else len(predecessors[ngram]) for ngram, count in occurrences.items()}


@given(texts)
def test_incremental_counts_equal_a_batch_recount(corpus: list[list[int]]) -> None:
    assert learned(corpus).counts == recount(corpus)


@given(texts)
def test_occupancies_equal_a_batch_recount(corpus: list[list[int]]) -> None:
    counts = recount(corpus)
    expected = {
        order: tuple(sum(1 for ngram, count in counts.items() if len(ngram) == order and count == k) for k in (1, 2, 3, 4))
        for order in range(1, ORDER + 1)
    }
    assert learned(corpus).occupancies == expected


@given(texts, texts)
def test_the_order_of_learning_changes_nothing(first: list[list[int]], second: list[list[int]]) -> None:
    assert learned(first + second) == learned(second + first)


@given(texts, st.lists(st.integers(0, 7), max_size=8))
def test_probabilities_sum_to_one_in_every_context(corpus: list[list[int]], history: list[int]) -> None:
    distribution = learned(corpus).distribution((START, *history))
    assert distribution.probabilities.sum() + distribution.unknown == pytest.approx(1.0, abs=1e-9)
    assert (distribution.probabilities >= 0).all()


def test_discounts_by_the_formula() -> None:
    found = discounts((100, 40, 20, 10))
    ratio = 100 / 180
    assert (found.one, found.two, found.three) == pytest.approx((1 - 2 * ratio * 0.4, 2 - 3 * ratio * 0.5, 3 - 4 * ratio * 0.5))


@pytest.mark.parametrize("occupancy", [(0, 1, 1, 1), (5, 0, 1, 0), (3, 3, 0, 1), (1, 1, 1, 90)])
def test_discounts_fall_back_where_they_cannot_be_estimated(occupancy: tuple[int, int, int, int]) -> None:
    assert discounts(occupancy) == FALLBACK_DISCOUNTS


def test_a_hand_counted_example() -> None:
    table = learned([[1, 2], [1, 2]])
    assert table.counts == {
        (START, 1): 2,
        (START, 1, 2): 2,
        (START, 1, 2, END): 2,
        (1,): 1,
        (2,): 1,
        (1, 2): 1,
        (END,): 1,
        (2, END): 1,
        (1, 2, END): 1,
    }


def test_a_learned_text_is_more_probable_than_what_never_followed() -> None:
    distribution = learned([[1, 2, 3], [1, 2, 3], [1, 2, 4]]).distribution((START, 1, 2))
    assert distribution.of(3) > distribution.of(4) > distribution.of(1) > distribution.unknown > 0
    assert distribution.of(99) == distribution.unknown


def test_longest_ngrams_cover_each_token_and_the_end_once() -> None:
    assert longest_ngrams([7, 8]) == {(START, 7): 1, (START, 7, 8): 1, (START, 7, 8, END): 1}


def test_contexts_are_the_suffixes_of_the_history() -> None:
    assert contexts([START, 1, 2, 3, 4]) == [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)]
    assert contexts([START]) == [(START,)]
