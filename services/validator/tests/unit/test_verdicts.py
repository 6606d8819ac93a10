"""Verdicts on real tables that ship inside scikit-learn, with damage whose truth is known because it is made here.

`TESSERA_VALIDATOR_SEEDS=20 pytest services/validator/tests/unit/test_verdicts.py -s` measures the rates of
docs/validation.md; the default of one seed keeps the suite quick. Reference and candidate are disjoint random halves of
a table; damage is done to the candidate's half.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from tessera.contracts.events import ValidationReport
from tessera.validator.domain.tables import Columns, Comparison, Table
from tessera.validator.domain.verdict import judge, judge_alone

pytestmark = [pytest.mark.unit, pytest.mark.timeout(3_600)]

Rows = NDArray[np.float64]
Damage = Callable[[Rows, Rows, np.random.Generator], Rows]

SEEDS = int(os.environ.get("TESSERA_VALIDATOR_SEEDS", "1"))
TABLES = {"wine": load_wine, "diabetes": load_diabetes}
if "TESSERA_VALIDATOR_SEEDS" in os.environ:  # the widest table costs most of the time, so it is judged where rates are measured
    TABLES["breast_cancer"] = load_breast_cancer


def table(rows: Rows) -> Table:
    whole = np.ascontiguousarray(rows, dtype=float)
    _, hashes = np.unique(np.nan_to_num(whole, nan=-1e99), axis=0, return_inverse=True)
    return Table(hashes.ravel().astype(np.uint64), whole, np.empty((len(whole), 0), dtype=np.int64))


def compared(candidate: Rows, reference: Rows) -> Comparison:
    both = table(np.concatenate((candidate, reference)))  # hashed together, so that equal rows are equal on both sides
    split = np.arange(len(candidate)), np.arange(len(candidate), len(both.numeric))
    columns = Columns(tuple(f"c{index}" for index in range(reference.shape[1])), ())
    return Comparison(both.take(split[0]), both.take(split[1]), columns)


def bootstrapped(generations: int) -> Damage:
    """Each generation is drawn, with replacement, from the one before: distinct rows die out."""

    def damage(_: Rows, half: Rows, random: np.random.Generator) -> Rows:
        for _generation in range(generations):
            half = half[random.integers(0, len(half), len(half))]
        return half

    return damage


def gaussian(generations: int, rows: int) -> Damage:
    """A diagonal Gaussian is fitted to few rows of the generation before: variance decays by 1 - 1/rows each time."""

    def damage(_: Rows, half: Rows, random: np.random.Generator) -> Rows:
        for _generation in range(generations):
            few = half[random.permutation(len(half))[:rows]]
            half = few.mean(axis=0) + few.std(axis=0) * random.standard_normal(half.shape)
        return half

    return damage


def shrunk_kernel(generations: int) -> Damage:
    """Each generation is drawn from a kernel density of the one before, shrunk by a tenth towards its mean."""

    def damage(_: Rows, half: Rows, random: np.random.Generator) -> Rows:
        for _generation in range(generations):
            noise = 0.1 * half.std(axis=0) * random.standard_normal(half.shape)
            drawn = half[random.integers(0, len(half), len(half))] + noise
            half = half.mean(axis=0) + 0.9 * (drawn - half.mean(axis=0))
        return half

    return damage


def scaled(factor: float) -> Damage:
    return lambda _, half, __: half.mean(axis=0) + factor * (half - half.mean(axis=0))


def rounded(half: Rows, step: Rows) -> Rows:
    return np.round(half / step) * step


def without(share: float) -> Damage:
    return lambda _, half, random: np.where(random.random(half.shape) < share, np.nan, half)


HEALTHY: dict[str, Damage] = {
    "an unseen half": lambda _, half, __: half,
    "half of an unseen half": lambda _, half, __: half[: max(len(half) // 2, 40)],
}
BENIGN: dict[str, Damage] = {
    "shifted by half a deviation": lambda reference, half, _: half + 0.5 * reference.std(axis=0),
    "noise of a fifth of a deviation": lambda _, half, random: half + 0.2 * half.std(axis=0) * random.standard_normal(half.shape),
    "scaled by 1.15": scaled(1.15),
    "rounded to a tenth of a deviation": lambda reference, half, _: (
        np.round(half / (0.1 * reference.std(axis=0))) * 0.1 * reference.std(axis=0)
    ),
    "a tenth of the values missing": without(0.1),
}
COLLAPSED: dict[str, Damage] = {
    "bootstrapped once": bootstrapped(1),
    "bootstrapped five times": bootstrapped(5),
    "ten rows tiled": lambda _, half, __: np.tile(half[:10], (len(half) // 10, 1)),
    "half the variance": scaled(0.5**0.5),
    "shrunk kernel, five generations": shrunk_kernel(5),
    "gaussian of 20 rows, 30 generations": gaussian(30, 20),
}
COPIED: dict[str, Damage] = {
    "the reference itself": lambda reference, _, __: reference,
    "the reference with a hundredth of noise": lambda reference, _, random: (
        reference + 0.01 * reference.std(axis=0) * random.standard_normal(reference.shape)
    ),
}


def reports(name: str, damage: Damage) -> list[ValidationReport]:
    rows = TABLES[name]().data
    found = []
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        order, half = random.permutation(len(rows)), len(rows) // 2
        reference, unseen = rows[order[:half]], rows[order[half : 2 * half]]
        found.append(judge(compared(damage(reference, unseen, random), reference)))
    return found


def failed(report: ValidationReport, axis: str) -> bool:
    return any(not evidence.passed for evidence in report.evidence if evidence.axis == axis)


def tell(name: str, case: str, found: list[ValidationReport]) -> None:
    verdicts = Counter(report.verdict for report in found)
    axes = {axis: sum(failed(report, axis) for report in found) for axis in ("collapse", "copying", "drift")}
    print(f"{name:<14} {case:<40} {dict(verdicts)} {axes}")  # noqa: T201 - the measurement's output


def tolerated(share: float) -> int:
    """How many of the seeds may err; none of a few."""
    return int(share * SEEDS)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("case", HEALTHY)
def test_unseen_real_rows_are_approved(name: str, case: str) -> None:
    found = reports(name, HEALTHY[case])
    tell(name, case, found)
    assert sum(report.verdict == "reject" for report in found) <= tolerated(0.05)
    assert sum(report.verdict != "approve" for report in found) <= max(tolerated(0.2), 1)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("case", BENIGN)
def test_a_benign_change_is_never_taken_for_collapse_or_copying(name: str, case: str) -> None:
    found = reports(name, BENIGN[case])
    tell(name, case, found)
    assert sum(report.verdict == "reject" or failed(report, "copying") for report in found) <= tolerated(0.05)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("case", COLLAPSED)
def test_collapse_is_rejected(name: str, case: str) -> None:
    found = reports(name, COLLAPSED[case])
    tell(name, case, found)
    assert all(failed(report, "collapse") for report in found)
    assert sum(report.verdict != "reject" for report in found) <= tolerated(0.1)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("case", COPIED)
def test_a_copy_of_the_reference_is_called_a_copy_and_not_collapse(name: str, case: str) -> None:
    found = reports(name, COPIED[case])
    tell(name, case, found)
    assert all(report.verdict == "reject" and failed(report, "copying") and not failed(report, "collapse") for report in found)


def test_the_same_rows_give_the_same_report_in_any_order() -> None:
    rows = load_wine().data
    first = judge(compared(rows[::2], rows[1::2]))
    assert judge(compared(rows[::2][::-1], rows[1::2])) == first


def test_an_added_constant_and_a_unit_change_of_both_sides_change_nothing_but_rounding() -> None:
    rows = load_wine().data
    first, second = judge(compared(rows[::2], rows[1::2])), judge(compared(rows[::2] * 100 + 7, rows[1::2] * 100 + 7))
    assert first.verdict == second.verdict
    left, right = ({e.dimension: e.statistic for e in report.evidence} for report in (first, second))
    assert left.keys() == right.keys()
    assert all(left[name] == pytest.approx(right[name], rel=0.05) for name in left)


def test_too_few_rows_ask_for_a_person() -> None:
    rows = load_wine().data
    report = judge(compared(rows[:20], rows[20:100]))
    assert (report.verdict, report.evidence) == ("review", ())
    assert report.reasons[0].startswith("too_few_rows")


def test_doubts_ask_for_a_person_but_never_save_a_collapsed_table() -> None:
    rows = load_wine().data
    doubt = ("columns_missing: x",)
    assert judge(compared(rows[::2], rows[1::2]), doubt).verdict == "review"
    assert judge(compared(np.tile(rows[:10], (9, 1)), rows[1::2]), doubt).verdict == "reject"


def test_without_a_reference_nothing_is_compared() -> None:
    report = judge_alone(5, ["a"])
    assert (report.verdict, report.evidence, report.reference_rows) == ("review", (), None)
