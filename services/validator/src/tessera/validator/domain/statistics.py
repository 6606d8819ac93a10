"""Statistics of one candidate sample against one reference sample of the same size.

The collapse statistics are logarithms of a share kept: 0 where nothing is lost, negative where something is. Each is
directional: more spread, more noise, more categories never count as a loss. Location is aligned first, so that a mere
shift is drift and not collapse (two-sample tests detect difference, not collapse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

import numpy as np

from tessera.validator.domain.tables import Codes, Floats, Table

RIDGE: Final = 1e-3
"""Added to the diagonal of standardised covariances: a lost direction counts as a thousandth kept, not as infinity."""
NEIGHBOURS: Final = 5
NEIGHBOUR_ROWS: Final = 400
RARE_CATEGORY_SHARE: Final = 0.05
_SMALLEST_VARIANCE: Final = 1e-4


@dataclass(frozen=True)
class Pair:
    """A candidate and a reference sample; what several statistics need is computed once."""

    candidate: Table
    reference: Table

    @cached_property
    def size(self) -> int:
        """Rows of either sample."""
        return min(len(self.candidate.numeric), len(self.reference.numeric))

    @cached_property
    def sorted_reference(self) -> Floats:
        """Standardised numeric columns in ascending order, missing values last."""
        return np.sort(self.standardised[1], axis=0)

    @cached_property
    def standardised(self) -> tuple[Floats, Floats]:
        """(candidate aligned in location, reference), both in units of the reference's centre and spread."""
        centre = winsorised_mean(self.reference.numeric)
        spread = np.sqrt(column_variance(self.reference.numeric))
        spread = np.where(spread > 0, spread, 1.0)
        candidate = (self.candidate.numeric - winsorised_mean(self.candidate.numeric)) / spread
        return candidate, (self.reference.numeric - centre) / spread

    @cached_property
    def equally_missing(self) -> tuple[Floats, Floats]:
        """The standardised samples, each without what the other's row of the same number lacks."""
        candidate, reference = (values[: self.size] for values in self.standardised)
        hidden = np.isnan(candidate) | np.isnan(reference)
        return np.where(hidden, np.nan, candidate), np.where(hidden, np.nan, reference)


def winsorised_mean(values: Floats) -> Floats:
    """Mean per column of values clipped to the column's own 5 % and 95 % quantiles: smooth, and deaf to outliers."""
    ordered = np.sort(values, axis=0)
    low, high = quantiles(ordered, 0.05), quantiles(ordered, 0.95)
    return np.nan_to_num(nan_mean(np.clip(values, low, high)))


def quantiles(ordered: Floats, share: float) -> Floats:
    """The nearest-rank quantile of each column sorted with missing values last."""
    present = np.count_nonzero(~np.isnan(ordered), axis=0)
    ranks = np.clip(np.round(share * (present - 1)).astype(int), 0, max(len(ordered) - 1, 0))
    found: Floats = np.take_along_axis(ordered, ranks[None, :], axis=0)[0]
    return found


def nan_mean(values: Floats) -> Floats:
    """Mean per column over what is present; NaN for an empty column, without a warning."""
    present = ~np.isnan(values)
    counts = present.sum(axis=0)
    return np.where(counts > 0, np.where(present, values, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def column_variance(values: Floats) -> Floats:
    """Variance per column over what is present; 0 for an empty column."""
    return np.nan_to_num(nan_mean((values - nan_mean(values)) ** 2))


def tail_mass(pair: Pair) -> float:
    """Log share kept of the mass in the reference's tails, and of its rare categories.

    Tails begin at q01 and q99; at q05 and q95 under 500 rows, where a percent is too few rows to count. A tail whose
    edge is tied (a discrete column) is left out: its mass is not a matter of tails.
    """
    kept, nominal = _numeric_tails(pair)
    rare_kept, rare_nominal = _rare_categories(pair)
    if nominal + rare_nominal == 0:
        return np.nan
    half_a_row = 0.5 / pair.size
    return float(np.log((kept + rare_kept + half_a_row) / (nominal + rare_nominal + half_a_row)))


def _numeric_tails(pair: Pair) -> tuple[float, float]:
    level = 0.01 if pair.size >= 500 else 0.05
    candidate, reference = pair.standardised
    edges = quantiles(pair.sorted_reference, level), quantiles(pair.sorted_reference, 1 - level)
    kept = nominal = 0.0
    for candidate_mass, reference_mass in (
        (nan_mean(_beyond(candidate, edges[0], below=True)), nan_mean(_beyond(reference, edges[0], below=True))),
        (nan_mean(_beyond(candidate, edges[1], below=False)), nan_mean(_beyond(reference, edges[1], below=False))),
    ):
        untied = (reference_mass > 0.4 * level) & ~np.isnan(candidate_mass)
        kept += float(candidate_mass[untied].sum())
        nominal += float(reference_mass[untied].sum())
    return kept, nominal


def _beyond(values: Floats, edge: Floats, *, below: bool) -> Floats:
    outside = values < edge if below else values > edge
    return np.where(np.isnan(values), np.nan, outside.astype(float))


def _rare_categories(pair: Pair) -> tuple[float, float]:
    kept = nominal = 0.0
    for column in range(pair.reference.codes.shape[1]):
        reference, candidate = category_shares(pair, column)
        rare = (reference > 0) & (reference < RARE_CATEGORY_SHARE)
        kept += float(candidate[rare].sum())
        nominal += float(reference[rare].sum())
    return kept, nominal


def category_shares(pair: Pair, column: int) -> tuple[Floats, Floats]:
    """(reference, candidate) shares of every category of one column, missing values left out."""
    width = int(max(pair.reference.codes[:, column].max(initial=-1), pair.candidate.codes[:, column].max(initial=-1))) + 1
    return _shares(pair.reference.codes[:, column], width), _shares(pair.candidate.codes[:, column], width)


def _shares(codes: Codes, width: int) -> Floats:
    counts = np.bincount(codes[codes >= 0], minlength=width).astype(float)
    shares: Floats = counts / max(float(counts.sum()), 1.0)
    return shares


def log_variance(pair: Pair) -> float:
    """Mean over the numeric columns of the log variance ratio."""
    ratios = column_log_variance(pair)
    return float(ratios.mean()) if len(ratios) else np.nan


def column_log_variance(pair: Pair) -> Floats:
    """Log variance ratio of every numeric column."""
    candidate, reference = pair.standardised
    return np.log((column_variance(candidate) + _SMALLEST_VARIANCE) / (column_variance(reference) + _SMALLEST_VARIANCE))


def log_determinant(pair: Pair) -> float:
    """Log ratio per column of the determinants of the covariances: volume lost, also where each column keeps its spread.

    Missing values are left out pair by pair, and what either side lacks is hidden in the other, so that missingness
    does not look like lost variance.
    """
    candidate, reference = pair.equally_missing
    if reference.shape[1] < 2:
        return np.nan
    return float((_log_det(candidate) - _log_det(reference)) / reference.shape[1])


def _log_det(values: Floats) -> float:
    present = ~np.isnan(values)
    centred = np.where(present, values - np.nan_to_num(nan_mean(values)), 0.0)
    shared = present.T.astype(float) @ present.astype(float)
    covariance = (centred.T @ centred) / np.maximum(shared, 1.0)
    eigenvalues = np.linalg.eigvalsh(covariance)
    return float(np.log(np.maximum(eigenvalues, 0.0) + RIDGE).sum())


def entropy(pair: Pair) -> float:
    """Mean over the categorical columns of the difference in entropy: the log share kept of effective categories."""
    differences = [_entropy(candidate) - _entropy(reference) for reference, candidate in _all_shares(pair)]
    return float(np.mean(differences)) if differences else np.nan


def _all_shares(pair: Pair) -> list[tuple[Floats, Floats]]:
    return [category_shares(pair, column) for column in range(pair.reference.codes.shape[1])]


def _entropy(shares: Floats) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum())


def support(pair: Pair) -> float:
    """Log share kept of bins and categories in which a healthy sample of this size has at least five rows."""
    occupied = [*_occupied_bins(pair), *_occupied_categories(pair)]
    return math.log(max(float(np.mean(occupied)), 1e-3)) if occupied else np.nan


def _occupied_bins(pair: Pair) -> list[float]:
    candidate, _ = pair.standardised
    bins = min(20, pair.size // 10)
    return [_occupied(candidate[:, column], pair.sorted_reference[:, column], bins) for column in range(candidate.shape[1])]


def _occupied(candidate: Floats, ordered: Floats, bins: int) -> float:
    """Edges lie midway between neighbouring values, so that a tied value never falls on one."""
    values = np.unique(ordered[~np.isnan(ordered)])
    if len(values) < 2 or bins < 2:
        return 1.0
    ranks = np.unique(np.searchsorted(values, quantiles_of(ordered, np.arange(1, bins) / bins)))
    ranks = ranks[(ranks > 0) & (ranks < len(values))]
    edges = (values[ranks - 1] + values[ranks]) / 2
    present = candidate[~np.isnan(candidate)]
    expected = np.bincount(np.searchsorted(edges, ordered[~np.isnan(ordered)]), minlength=len(edges) + 1)
    found = np.bincount(np.searchsorted(edges, present), minlength=len(edges) + 1)
    judged = expected >= 5
    return float((found[judged] > 0).mean()) if judged.any() else 1.0


def quantiles_of(ordered: Floats, shares: Floats) -> Floats:
    """Nearest-rank quantiles of one column sorted with missing values last."""
    present = np.count_nonzero(~np.isnan(ordered))
    found: Floats = ordered[np.round(shares * (present - 1)).astype(int)]
    return found


def _occupied_categories(pair: Pair) -> list[float]:
    found = []
    for reference, candidate in _all_shares(pair):
        judged = reference * pair.size >= 5
        if judged.any():
            found.append(float((candidate[judged] > 0).mean()))
    return found


def recall(pair: Pair) -> float:
    """Log share of reference rows inside the candidate's own neighbourhoods (Kynkäänniemi 2019, k = 5).

    Falls when modes are dropped or few rows are repeated; noise widens the neighbourhoods and does not lower it.
    """
    candidate, reference = (values[:NEIGHBOUR_ROWS] for values in pair.equally_missing)
    candidate_codes, reference_codes = pair.candidate.codes[:NEIGHBOUR_ROWS], pair.reference.codes[:NEIGHBOUR_ROWS]
    if len(candidate) <= NEIGHBOURS:
        return np.nan
    within = squared_distances(candidate, candidate_codes, candidate, candidate_codes)
    radius = np.partition(within, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
    across = squared_distances(reference, reference_codes, candidate, candidate_codes)
    covered = (across <= radius[None, :] + 1e-12).any(axis=1)
    return math.log(float(np.mean(covered)) + 1 / len(reference))


def squared_distances(left: Floats, left_codes: Codes, right: Floats, right_codes: Codes) -> Floats:
    """Squared distances between rows: numeric columns over what both have, plus one for each category that differs."""
    return _numeric_distances(left, right) + _category_distances(left_codes, right_codes)


def _numeric_distances(left: Floats, right: Floats) -> Floats:
    has_left, has_right = ~np.isnan(left), ~np.isnan(right)
    a, b = np.where(has_left, left, 0.0), np.where(has_right, right, 0.0)
    squares = (a**2) @ has_right.T.astype(float) + has_left.astype(float) @ (b**2).T - 2 * a @ b.T
    shared = has_left.astype(float) @ has_right.T.astype(float)
    distances: Floats = np.maximum(squares, 0.0) * left.shape[1] / np.maximum(shared, 1.0)
    return distances


def _category_distances(left: Codes, right: Codes) -> Floats:
    total = np.zeros((len(left), len(right)))
    for column in range(left.shape[1]):
        total += left[:, column][:, None] != right[:, column][None, :]
    return total


def marginal_shift(pair: Pair) -> float:
    """The largest Kolmogorov-Smirnov distance of a numeric column, or total variation of a categorical one."""
    return float(max(column_shifts(pair), default=np.nan))


def column_shifts(pair: Pair) -> list[float]:
    """The distance of every column, numeric ones first. Values are compared as they are, not aligned."""
    numeric = [
        kolmogorov_smirnov(pair.candidate.numeric[:, column], pair.reference.numeric[:, column])
        for column in range(pair.reference.numeric.shape[1])
    ]
    return numeric + [float(np.abs(reference - candidate).sum() / 2) for reference, candidate in _all_shares(pair)]


def kolmogorov_smirnov(candidate: Floats, reference: Floats) -> float:
    """Largest distance between the distribution functions of what is present; 1 where one side is empty."""
    left, right = np.sort(candidate[~np.isnan(candidate)]), np.sort(reference[~np.isnan(reference)])
    if not len(left) or not len(right):
        return 1.0 if len(left) or len(right) else 0.0
    points = np.concatenate((left, right))
    below_left = np.searchsorted(left, points, side="right") / len(left)
    below_right = np.searchsorted(right, points, side="right") / len(right)
    return float(np.abs(below_left - below_right).max())


def missing_shift(pair: Pair) -> float:
    """The largest change of a column's share of missing values, whichever way."""
    changes = np.abs(missing_shares(pair.candidate) - missing_shares(pair.reference))
    return float(changes.max(initial=0.0))


def missing_shares(table: Table) -> Floats:
    """Share of missing values of every column, numeric ones first."""
    return np.concatenate((np.isnan(table.numeric).mean(axis=0), (table.codes < 0).mean(axis=0)))


COLLAPSE: Final[Mapping[str, Callable[[Pair], float]]] = MappingProxyType(
    {
        "tail_mass": tail_mass,
        "variance": log_variance,
        "covariance": log_determinant,
        "entropy": entropy,
        "support": support,
        "recall": recall,
    }
)
"""Log shares kept: lower is worse."""

DRIFT: Final[Mapping[str, Callable[[Pair], float]]] = MappingProxyType({"marginal_shift": marginal_shift, "missing_shift": missing_shift})
"""Distances: higher is further."""
