"""Rows that repeat: within the candidate (collapse), and from the reference (copying)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from tessera.validator.domain.calibration import normal_tail
from tessera.validator.domain.statistics import squared_distances
from tessera.validator.domain.tables import Comparison, Floats, Hashes, Table

_DRAWS: Final = 20
_CANDIDATE_ROWS: Final = 1_000
_REFERENCE_ROWS: Final = 4_000
_NEAR_QUANTILE: Final = 0.05
_NEAR_FACTOR: Final = 0.5


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the candidate's rows, and the share that healthy data of this size shows."""

    value: float
    expected: float
    rows: int

    @property
    def excess(self) -> float:
        """What remains after what healthy data shows too."""
        return self.value - self.expected

    @property
    def deviation(self) -> float:
        """Binomial, at the expected share; at least half a row."""
        return max(math.sqrt(self.expected * (1 - self.expected) / self.rows), 0.5 / self.rows)

    @property
    def p_value(self) -> float:
        """Probability that healthy data repeats this much (normal tail of the binomial)."""
        return normal_tail((self.excess - 0.5 / self.rows) / self.deviation)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval (Wilson score)."""
        z, n = 1.96, self.rows
        centre = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n))
        return max(centre - half, 0.0), min(centre + half, 1.0)


def duplication(comparison: Comparison, seed: int) -> Share:
    """Share of the candidate's rows that repeat another of its rows, counted over the whole file.

    The expected share is the reference's own at the same number of rows; where the candidate is the larger, the
    candidate is drawn down to the reference's size instead, because natural repeats grow with size.
    """
    candidate, reference = comparison.candidate.hashes, comparison.reference.hashes
    size = min(len(candidate), len(reference))
    random = np.random.default_rng(seed)
    return Share(_repeated(candidate, size, random), _repeated(reference, size, random), size)


def _repeated(hashes: Hashes, size: int, random: np.random.Generator) -> float:
    ordered = np.sort(hashes)
    draws = 1 if size == len(hashes) else _DRAWS
    return float(np.mean([1 - len(np.unique(random.permutation(ordered)[:size])) / size for _ in range(draws)]))


def exact_copies(comparison: Comparison, seed: int) -> Share:
    """Share of the candidate's rows that stand in the reference, counted over both files.

    The expected share is how much of one half of the reference stands in the other, for twice as large a half.
    """
    candidate, reference = comparison.candidate.hashes, comparison.reference.hashes
    random = np.random.default_rng(seed)
    ordered, half = np.sort(reference), len(reference) // 2
    natural = []
    for _ in range(_DRAWS):
        order = random.permutation(ordered)
        natural.append(np.isin(order[:half], order[half:]).mean())
    expected = min(2 * float(np.mean(natural)), 1.0)
    return Share(float(np.isin(candidate, reference).mean()), expected, len(candidate))


def near_copies(comparison: Comparison, seed: int) -> Share | None:
    """Share of the candidate's rows far closer to a reference row than reference rows are to each other.

    "Far closer" is half of the 5 % quantile of the reference's own nearest distances; the expected share is the
    reference's own at that distance. None without numeric columns, or where the reference's own rows repeat.
    """
    if not comparison.columns.numeric:
        return None
    random = np.random.default_rng(seed)
    reference = _first(comparison.reference, _REFERENCE_ROWS, random)
    candidate = _first(comparison.candidate, _CANDIDATE_ROWS, random)
    own = _nearest(_first(reference, _CANDIDATE_ROWS, random), reference, itself=True)
    threshold = _NEAR_FACTOR * float(np.quantile(own, _NEAR_QUANTILE))
    if threshold <= 0:
        return None
    found = _nearest(candidate, reference, itself=False)
    return Share(float((found < threshold).mean()), float((own < threshold).mean()), candidate.sampled_rows)


def _first(table: Table, rows: int, random: np.random.Generator) -> Table:
    return table.take(random.permutation(table.sampled_rows)[:rows])


def _nearest(rows: Table, reference: Table, *, itself: bool) -> Floats:
    """Distance of every row to its nearest reference row; to its nearest other one where the rows are the reference's."""
    spread = np.nanstd(reference.numeric, axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    squares = squared_distances(rows.numeric / spread, rows.codes, reference.numeric / spread, reference.codes)
    ordered = np.partition(squares, 1, axis=1) if squares.shape[1] > 1 else squares
    return np.sqrt(ordered[:, 1 if itself and squares.shape[1] > 1 else 0])
