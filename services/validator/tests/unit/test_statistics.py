"""Every statistic on samples whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import stats

from tessera.contracts.errors import InvalidError
from tessera.validator.domain import statistics
from tessera.validator.domain.calibration import Draws, measure
from tessera.validator.domain.repetition import Share, duplication, exact_copies, near_copies
from tessera.validator.domain.statistics import COLLAPSE, Pair, kolmogorov_smirnov
from tessera.validator.domain.tables import Columns, Comparison, Table, usable
from tessera.validator.domain.verdict import COLLAPSE_BANDS, Severity, judge

pytestmark = pytest.mark.unit

NORMAL = np.random.default_rng(11).standard_normal((600, 4))
COLUMNS = Columns(("a", "b", "c", "d"), ())
values = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))
columns = arrays.arrays(np.float64, st.integers(2, 60), elements=values)


def table(numeric: NDArray[np.float64], codes: NDArray[np.int64] | None = None) -> Table:
    given_codes = np.empty((len(numeric), 0), dtype=np.int64) if codes is None else codes
    return Table(np.arange(len(numeric), dtype=np.uint64), numeric, given_codes)


def categorical(*codes: int) -> Table:
    return table(np.empty((len(codes), 0)), np.asarray(codes, dtype=np.int64)[:, None])


@pytest.mark.parametrize("name", ["tail_mass", "variance", "covariance", "support"])
def test_a_sample_against_itself_loses_nothing(name: str) -> None:
    assert COLLAPSE[name](Pair(table(NORMAL), table(NORMAL))) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["tail_mass", "variance", "covariance", "support", "recall"])
def test_more_spread_is_no_loss_and_less_is_one(name: str) -> None:
    statistic, reference = COLLAPSE[name], table(NORMAL[:300])
    assert statistic(Pair(table(2 * NORMAL[300:]), reference)) > -0.1
    assert statistic(Pair(table(0.1 * NORMAL[300:]), reference)) < -0.2


def test_a_shift_alone_changes_no_collapse_statistic() -> None:
    reference = table(NORMAL[:300])
    for statistic in (COLLAPSE[name] for name in ("tail_mass", "variance", "covariance", "support", "recall")):
        still, moved = (statistic(Pair(table(NORMAL[300:] + shift), reference)) for shift in (0.0, 1e3))
        assert moved == pytest.approx(still, abs=1e-6)


def test_the_log_variance_is_the_textbooks() -> None:
    pair = Pair(table(NORMAL * 0.5), table(NORMAL))
    assert statistics.log_variance(pair) == pytest.approx(2 * math.log(0.5), abs=1e-3)


def test_a_lost_correlation_direction_shows_in_the_determinant_alone() -> None:
    tied = NORMAL.copy()
    tied[:, 1] = tied[:, 0]
    pair = Pair(table(tied), table(NORMAL))
    assert statistics.log_determinant(pair) < -1
    assert abs(statistics.log_variance(pair)) < 0.1


def test_entropy_and_support_see_lost_categories() -> None:
    reference, candidate = categorical(*[0, 1, 2, 3] * 25), categorical(*[0, 1] * 50)
    assert statistics.entropy(Pair(candidate, reference)) == pytest.approx(-math.log(2))
    assert statistics.support(Pair(candidate, reference)) == pytest.approx(-math.log(2))


def test_rare_categories_are_tails() -> None:
    reference, candidate = categorical(*[0] * 97, 1, 2, 3), categorical(*[0] * 100)
    assert statistics.tail_mass(Pair(candidate, reference)) < -1.5


@given(columns, columns)
def test_the_ks_distance_is_scipys(left: NDArray[np.float64], right: NDArray[np.float64]) -> None:
    assert kolmogorov_smirnov(left, right) == pytest.approx(stats.ks_2samp(left, right, method="asymp").statistic)


@given(columns)
def test_missing_values_do_not_move_the_mean_or_variance(column: NDArray[np.float64]) -> None:
    gaps = np.concatenate((column, np.full(7, np.nan)))[:, None]
    assert statistics.nan_mean(gaps)[0] == pytest.approx(column.mean(), abs=1e-6)
    assert statistics.column_variance(gaps)[0] == pytest.approx(column.var(), rel=1e-6, abs=1e-6)


def test_an_empty_side_is_as_far_away_as_can_be() -> None:
    empty, full = np.full(3, np.nan), np.arange(3.0)
    assert (kolmogorov_smirnov(empty, full), kolmogorov_smirnov(empty, empty)) == (1.0, 0.0)


def test_constant_and_identifying_columns_carry_no_evidence() -> None:
    numeric = np.column_stack((np.ones(200), np.arange(200.0), np.full(200, np.nan)))
    codes = np.column_stack((np.arange(200), np.arange(200) % 3))
    both = Table(np.arange(200, dtype=np.uint64), numeric, codes)
    kept = usable(Comparison(both, both, Columns(("one", "n", "none"), ("id", "kind"))))
    assert kept.columns == Columns(("n",), ("kind",))


def test_nothing_but_constants_is_said_so() -> None:
    both = table(np.ones((60, 1)))
    with pytest.raises(InvalidError) as raised:
        usable(Comparison(both, both, Columns(("a",), ())))
    assert raised.value.code == "no_usable_columns"


def test_a_column_that_became_constant_is_collapse() -> None:
    candidate = NORMAL[300:].copy()
    candidate[:, 2] = 1.0
    report = judge(Comparison(table(candidate), table(NORMAL[:300]), COLUMNS))
    assert report.verdict == "reject"
    assert next(e for e in report.evidence if e.dimension == "variance").columns[0] == "c"


def test_mixed_tables_are_judged_over_all_columns() -> None:
    kinds = np.random.default_rng(8).integers(0, 6, (600, 2))
    whole = Table(np.arange(600, dtype=np.uint64), NORMAL, kinds)
    columns = Columns(COLUMNS.numeric, ("k", "l"))
    healthy = judge(Comparison(whole.take(np.arange(300)), whole.take(np.arange(300, 600)), columns))
    poor = Table(whole.hashes, NORMAL, np.minimum(kinds, 1))
    collapsed = judge(Comparison(poor.take(np.arange(300)), whole.take(np.arange(300, 600)), columns))
    assert (healthy.verdict != "reject", collapsed.verdict) == (True, "reject")
    assert all(e.passed for e in healthy.evidence if e.axis == "collapse")
    assert {e.dimension for e in collapsed.evidence if not e.passed} >= {"entropy", "support"}


def test_halves_are_calibrated_whatever_the_sizes() -> None:
    """p values of healthy candidates of very different size stay away from nought."""
    for rows in (60, 300, 540):
        measured = measure(Comparison(table(NORMAL[:rows]), table(np.random.default_rng(rows).standard_normal((300, 4))), COLUMNS), Draws())
        assert all(value.lower_p > 1e-3 for name, value in measured.items() if name in COLLAPSE)


def test_repeats_are_compared_at_one_size() -> None:
    hashes = np.arange(100, dtype=np.uint64)
    rows = np.zeros((100, 1))
    codes = np.empty((100, 0), dtype=np.int64)
    unique, doubled = Table(hashes, rows, codes), Table(hashes // 2, rows, codes)
    assert duplication(Comparison(doubled, unique, Columns(("a",), ())), 1).excess == pytest.approx(0.5)
    assert duplication(Comparison(doubled, doubled, Columns(("a",), ())), 1).excess == pytest.approx(0.0)


def test_natural_coincidences_are_not_copies() -> None:
    """A table with few possible rows repeats the reference by nature."""
    reference = Table(
        np.random.default_rng(9).integers(0, 12, 400).astype(np.uint64), np.zeros((400, 1)), np.empty((400, 0), dtype=np.int64)
    )
    assert exact_copies(Comparison(reference, reference, Columns(("a",), ())), 1).excess <= 0.0


def test_near_copies_are_told_from_neighbours() -> None:
    fresh = Comparison(table(NORMAL[300:]), table(NORMAL[:300]), COLUMNS)
    close = Comparison(table(NORMAL[:300] + 1e-6), table(NORMAL[:300]), COLUMNS)
    found = [near_copies(comparison, 1) for comparison in (fresh, close)]
    assert [share is not None and share.value for share in found] == [pytest.approx(0.0, abs=0.02), 1.0]


def test_a_share_has_an_interval_around_it() -> None:
    share = Share(0.3, 0.0, 100)
    assert share.interval[0] < 0.3 < share.interval[1]
    assert Share(0.0, 0.0, 100).interval[0] == 0.0


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_worse_finding_is_never_milder(effect: float, worse: float, p_value: float) -> None:
    low, high = sorted((effect, worse))
    assert COLLAPSE_BANDS.severity(low, p_value) <= COLLAPSE_BANDS.severity(high, p_value)
    assert COLLAPSE_BANDS.severity(0.04, p_value) is Severity.NONE
