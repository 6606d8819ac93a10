"""What a statistic would be if nothing were wrong: halves of the reference against each other.

The candidate and the reference are compared at one sample size `s = min(m, n // 2)`, on the average of several draws;
so are disjoint halves of the reference. Equal sizes remove the bias of every statistic that depends on size (extreme
quantiles, determinants, neighbours, categories seen), without a formula for any of them. The halves' spread is scaled
from `s` to the rows really compared. Draws are seeded and rows are taken in hash order, so an answer depends on the
rows alone and not on their order in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tessera.validator.domain.statistics import COLLAPSE, DRIFT, NEIGHBOUR_ROWS, Pair
from tessera.validator.domain.tables import Comparison, Floats, Table

STATISTICS: Final[Mapping[str, Callable[[Pair], float]]] = {**COLLAPSE, **DRIFT}
_ROWS: Final = {"recall": NEIGHBOUR_ROWS}
_INTERVAL: Final = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Draws:
    """How much is drawn. More draws cost time in proportion and narrow the last digit of a p value."""

    null: int = 200
    """Splits of the reference into halves."""
    observed: int = 40
    """Draws of candidate against reference that are averaged."""
    bootstrap: int = 80
    """Resamples with replacement for the interval."""
    rows: int = 2_000
    """Largest sample of one draw."""
    seed: int = 20_260_101


@dataclass(frozen=True, slots=True)
class Measured:
    """One statistic of a candidate, and where healthy halves of the reference put it."""

    value: float
    expected: float
    """Mean over the healthy halves."""
    deviation: float
    """Standard deviation that a healthy candidate of this size would show."""
    interval: tuple[float, float]
    """95 % bootstrap interval of `value`."""

    @property
    def excess(self) -> float:
        """What remains after what healthy data shows too."""
        return self.value - self.expected

    @property
    def lower_p(self) -> float:
        """Probability that healthy data lies this low (normal tail)."""
        return normal_tail(-self.excess / self.deviation)

    @property
    def upper_p(self) -> float:
        """Probability that healthy data lies this high (normal tail)."""
        return normal_tail(self.excess / self.deviation)


def normal_tail(z: float) -> float:
    """Probability that a standard normal exceeds `z`."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def measure(comparison: Comparison, draws: Draws) -> dict[str, Measured]:
    """Every statistic that applies to these tables, calibrated. CPU-bound for seconds: never call it on an event loop."""
    candidate, reference = _ordered(comparison.candidate), _ordered(comparison.reference)
    size = min(candidate.sampled_rows, reference.sampled_rows // 2, draws.rows)
    random = np.random.default_rng(draws.seed)
    null = _evaluate(lambda: _halves(reference, size, random), draws.null)
    observed = _evaluate(lambda: Pair(_draw(candidate, size, random), _draw(reference, size, random)), draws.observed)
    spread = _evaluate(lambda: Pair(_resample(candidate, size, random), _resample(reference, size, random)), draws.bootstrap)
    information = 1 / candidate.sampled_rows + 1 / reference.sampled_rows
    return {
        name: _measured(observed[name], null[name], spread[name], information * min(size, _ROWS.get(name, size)) / 2, size)
        for name in STATISTICS
        if np.isfinite(observed[name]).all() and np.isfinite(null[name]).all()
    }


def _measured(observed: Floats, null: Floats, spread: Floats, scale: float, size: int) -> Measured:
    value = float(observed.mean())
    shrink = math.sqrt(min(scale + (1 - scale) / len(observed), 1.0))
    low, high = np.percentile((spread - spread.mean()) * shrink, _INTERVAL)
    deviation = max(float(null.std(ddof=1)) * shrink, 0.5 / size)
    return Measured(value, float(null.mean()), deviation, (value + float(low), value + float(high)))


def _evaluate(draw: Callable[[], Pair], count: int) -> dict[str, Floats]:
    values: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for _ in range(count):
        pair = draw()
        for name, statistic in STATISTICS.items():
            values[name].append(statistic(pair))
    return {name: np.asarray(found) for name, found in values.items()}


def _ordered(table: Table) -> Table:
    """Sampled rows by content, so that the file's row order does not matter."""
    keys = [*table.codes.T, *np.nan_to_num(table.numeric, nan=-np.inf).T]
    order = np.lexsort(keys) if keys else np.arange(0)
    return Table(table.hashes[: len(order)], table.numeric[order], table.codes[order])


def _halves(reference: Table, size: int, random: np.random.Generator) -> Pair:
    order = random.permutation(reference.sampled_rows)
    return Pair(reference.take(order[:size]), reference.take(order[size : 2 * size]))


def _draw(table: Table, size: int, random: np.random.Generator) -> Table:
    return table.take(random.permutation(table.sampled_rows)[:size])


def _resample(table: Table, size: int, random: np.random.Generator) -> Table:
    return table.take(random.integers(0, table.sampled_rows, size))
