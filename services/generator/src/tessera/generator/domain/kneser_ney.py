"""Interpolated modified Kneser-Ney over adjusted counts that grow one text at a time.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1999), with the discounts and
the interpolation down to a uniform distribution of Heafield et al., "Scalable Modified Kneser-Ney Language Model
Estimation" (ACL 2013). The count of an n-gram of the highest order, or of one that begins a text, is how often it
occurred; any other n-gram's count is how many different tokens were seen before it. Learning keeps both exact: the
longest n-gram at each position is bumped, and whenever an n-gram is new, so is one predecessor of its suffix.

Everything here is sans I/O: `learning` says what to bump and is told the counts after it, whoever keeps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

ORDER: Final = 5
START: Final = -1
"""Stands before a text; never predicted."""
END: Final = -2
"""Stands after a text; predicting it ends a generation."""

Ngram: TypeAlias = tuple[int, ...]
Tokens: TypeAlias = NDArray[np.int64]
Probabilities: TypeAlias = NDArray[np.float64]
Occupancy: TypeAlias = tuple[int, int, int, int]
"""How many n-grams of one order have a count of exactly 1, 2, 3 and 4."""

_HIGHEST_COUNTED: Final = 4


@dataclass(frozen=True)
class Discounts:
    """What is taken from counts of 1, of 2, and of 3 and more."""

    one: float
    two: float
    three: float

    def of(self, counts: Tokens) -> Probabilities:
        """The discount of each count; every count is at least 1."""
        return np.choose(np.minimum(counts, 3) - 1, (self.one, self.two, self.three)).astype(np.float64)


FALLBACK_DISCOUNTS: Final = Discounts(0.5, 1.0, 1.5)
"""For an order with too few n-grams to estimate its own, as KenLM's `--discount_fallback` has them."""


def discounts(occupancy: Occupancy) -> Discounts:
    """The modified Kneser-Ney discounts of one order, or the fallback where they cannot be estimated."""
    if 0 in occupancy[:3]:
        return FALLBACK_DISCOUNTS
    ratio = occupancy[0] / (occupancy[0] + 2 * occupancy[1])
    amounts = [k - (k + 1) * ratio * occupancy[k] / occupancy[k - 1] for k in (1, 2, 3)]
    if any(not 0 <= amount <= k for k, amount in enumerate(amounts, start=1)):
        return FALLBACK_DISCOUNTS
    return Discounts(*amounts)


def longest_ngrams(tokens: Sequence[int]) -> Counter[Ngram]:
    """The longest n-gram that ends at each token of a text and at its end, with how often it occurs."""
    text = (START, *tokens, END)
    return Counter(text[max(0, end - ORDER) : end] for end in range(2, len(text) + 1))


@dataclass(frozen=True)
class Learned:
    """What one text changed: for each order from 1, the change of its occupancy."""

    occupancy_changes: Mapping[int, Occupancy]


def learning(tokens: Sequence[int]) -> Generator[Mapping[Ngram, int], Mapping[Ngram, int], Learned]:
    """Learn one text. Yields increments of n-grams of one order, highest first; send back the counts after them.

    A caller that persists the increments, the counts and the returned changes in one transaction keeps exactly the
    tables that a recount of all texts would give, in whatever order the texts came.
    """
    occurrences = longest_ngrams(tokens)
    new: Iterable[Ngram] = ()
    changes: dict[int, Occupancy] = {}
    for order in range(ORDER, 0, -1):
        increments = Counter(ngram[1:] for ngram in new)
        increments.update({ngram: count for ngram, count in occurrences.items() if len(ngram) == order})
        after = (yield increments) if increments else {}
        new = [ngram for ngram, increment in increments.items() if after[ngram] == increment]
        changes[order] = _occupancy_change(increments, after)
    return Learned(changes)


def _occupancy_change(increments: Mapping[Ngram, int], after: Mapping[Ngram, int]) -> Occupancy:
    change = [0] * (_HIGHEST_COUNTED + 1)
    for ngram, increment in increments.items():
        before, now = after[ngram] - increment, after[ngram]
        if 0 < before <= _HIGHEST_COUNTED:
            change[before] -= 1
        if now <= _HIGHEST_COUNTED:
            change[now] += 1
    return (change[1], change[2], change[3], change[4])


@dataclass(frozen=True)
class Followers:
    """The tokens seen after one context, ascending, with their adjusted counts."""

    tokens: Tokens
    counts: Tokens

    @classmethod
    def of(cls, counts: Iterable[tuple[int, int]]) -> Followers:
        """From (token, count) pairs in any order."""
        pairs = np.array(sorted(counts), dtype=np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Distribution:
    """The probability of every learned token, and of whatever was never seen; together they are 1."""

    vocabulary: Tokens
    probabilities: Probabilities
    unknown: float

    def of(self, token: int) -> float:
        """The probability of one token; an unknown one has the whole mass of the unknown."""
        index = int(np.searchsorted(self.vocabulary, token))
        if index < len(self.vocabulary) and self.vocabulary[index] == token:
            return float(self.probabilities[index])
        return self.unknown


def unigram_distribution(followers: Followers, occupancy: Occupancy) -> Distribution:
    """The distribution without context, interpolated with a uniform one over the vocabulary and the unknown."""
    uniform = 1.0 / (len(followers) + 1)
    flat = Distribution(followers.tokens, np.full(len(followers), uniform), uniform)
    return interpolated(flat, followers, discounts(occupancy))


def interpolated(lower: Distribution, followers: Followers, discount: Discounts) -> Distribution:
    """`lower` refined by what followed one more token of context. Every follower is in the vocabulary."""
    total = float(followers.counts.sum())
    taken = discount.of(followers.counts)
    backoff = float(taken.sum()) / total
    probabilities = lower.probabilities * backoff
    probabilities[np.searchsorted(lower.vocabulary, followers.tokens)] += (followers.counts - taken) / total
    return Distribution(lower.vocabulary, probabilities, lower.unknown * backoff)


def contexts(history: Sequence[int]) -> list[Ngram]:
    """The contexts that predict what follows `history` (which begins with START), shortest first, without the empty one."""
    return [tuple(history[-length:]) for length in range(1, min(ORDER - 1, len(history)) + 1)]


@dataclass
class CountTable:
    """The tables in memory: the executable specification of what Postgres keeps."""

    counts: dict[Ngram, int] = field(default_factory=dict)
    occupancies: dict[int, Occupancy] = field(default_factory=lambda: dict.fromkeys(range(1, ORDER + 1), (0, 0, 0, 0)))

    def learn(self, tokens: Sequence[int]) -> None:
        """Add one text; amortised O(order) per token."""
        steps = learning(tokens)
        try:
            increments = next(steps)
            while True:
                increments = steps.send(self._bump(increments))
        except StopIteration as finished:
            self._shift(finished.value.occupancy_changes)

    def _bump(self, increments: Mapping[Ngram, int]) -> Mapping[Ngram, int]:
        for ngram, increment in increments.items():
            self.counts[ngram] = self.counts.get(ngram, 0) + increment
        return {ngram: self.counts[ngram] for ngram in increments}

    def _shift(self, changes: Mapping[int, Occupancy]) -> None:
        for order, change in changes.items():
            first, second, third, fourth = (a + b for a, b in zip(self.occupancies[order], change, strict=True))
            self.occupancies[order] = (first, second, third, fourth)

    def followers(self, context: Ngram) -> Followers:
        """What was seen after `context`. Scans all counts: for tests and small tables."""
        return Followers.of((ngram[-1], count) for ngram, count in self.counts.items() if ngram[:-1] == context)

    def distribution(self, history: Sequence[int]) -> Distribution:
        """What follows `history`, which begins with START where the text does."""
        result = unigram_distribution(self.followers(()), self.occupancies[1])
        for context in contexts(history):
            followers = self.followers(context)
            if not len(followers):
                break
            result = interpolated(result, followers, discounts(self.occupancies[len(context) + 1]))
        return result
