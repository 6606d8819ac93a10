"""From evidence to a verdict, by a rule that is written down (docs/validation.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import numpy as np

from tessera.contracts.events import Evidence, ValidationReport, Verdict
from tessera.validator.domain.calibration import Draws, Measured, measure
from tessera.validator.domain.repetition import Share, duplication, exact_copies, near_copies
from tessera.validator.domain.statistics import COLLAPSE, DRIFT, Pair, column_log_variance, column_shifts
from tessera.validator.domain.tables import Comparison, usable

MINIMUM_ROWS: Final = 40
"""Fewer rows on either side cannot be calibrated."""
_REPORTED_COLUMNS: Final = 5


class Severity(IntEnum):
    """What a finding does to the verdict."""

    NONE = 0
    REVIEW = 1
    REJECT = 2


@dataclass(frozen=True, slots=True)
class Bands:
    """When a finding counts: its effect and its p value must both pass. p values are Bonferroni-corrected per axis."""

    review_effect: float
    reject_effect: float
    review_p: float = 0.05
    reject_p: float = 0.01

    def severity(self, effect: float, p_value: float) -> Severity:
        """How grave an effect with this corrected p value is."""
        if effect >= self.reject_effect and p_value < self.reject_p:
            return Severity.REJECT
        if effect >= self.review_effect and p_value < self.review_p:
            return Severity.REVIEW
        return Severity.NONE


COLLAPSE_BANDS: Final = Bands(review_effect=0.05, reject_effect=0.20)
"""Under 5 % lost is healthy, 5 to 20 % early collapse, more is collapse."""
COPYING_BANDS: Final = Bands(review_effect=0.02, reject_effect=0.50)
"""A few copied rows are somebody's decision; a dataset of which half is copied holds nothing new."""
DRIFT_BANDS: Final = Bands(review_effect=0.05, reject_effect=math.inf, review_p=0.01)
"""Drift alone never rejects: a shifted dataset may be just what was wanted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One dimension's evidence and its weight."""

    evidence: Evidence
    severity: Severity


def judge(comparison: Comparison, doubts: Sequence[str] = (), draws: Draws | None = None) -> ValidationReport:
    """The verdict on a candidate against its reference, with the evidence of every dimension that applies.

    `doubts` are reasons found elsewhere (missing columns) why a person must look at it whatever the evidence says.
    Deterministic: the same rows give the same report. CPU-bound for seconds. Raises InvalidError `no_usable_columns`.
    """
    chosen = draws or Draws()
    kept = usable(comparison)
    rows = min(kept.candidate.rows, kept.reference.rows)
    if rows < MINIMUM_ROWS:
        too_few = f"too_few_rows: {rows} rows on the smaller side, {MINIMUM_ROWS} are needed to calibrate."
        return _report(kept, (), (*doubts, too_few))
    measured = measure(kept, chosen)
    findings = (*_collapse(kept, measured, chosen.seed), *_copying(kept, chosen.seed), *_drift(kept, measured))
    return _report(kept, findings, doubts)


def judge_alone(rows: int, columns: Sequence[str]) -> ValidationReport:
    """What can be said without a reference: that a person must look. Data is never compared with itself."""
    reason = "reference_missing: collapse, drift and copying can only be told against a reference."
    return ValidationReport(verdict="review", reasons=(reason,), evidence=(), candidate_rows=rows, columns=tuple(columns))


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """reject if any finding rejects, review if any asks for it, approve else."""
    worst = max((finding.severity for finding in findings), default=Severity.NONE)
    verdicts: Mapping[Severity, Verdict] = {Severity.NONE: "approve", Severity.REVIEW: "review", Severity.REJECT: "reject"}
    return verdicts[worst]


def _report(comparison: Comparison, findings: Sequence[Finding], doubts: Sequence[str]) -> ValidationReport:
    verdict = verdict_of(findings)
    grave = sorted((finding for finding in findings if finding.severity), key=lambda finding: -finding.severity)
    reasons = (*(_because(finding.evidence) for finding in grave), *doubts)
    return ValidationReport(
        verdict="review" if doubts and verdict == "approve" else verdict,
        reasons=reasons or (f"All {len(findings)} dimensions lie where healthy halves of the reference lie.",),
        evidence=tuple(finding.evidence for finding in findings),
        candidate_rows=comparison.candidate.rows,
        reference_rows=comparison.reference.rows,
        columns=comparison.columns.names,
    )


def _because(evidence: Evidence) -> str:
    return f"{evidence.axis}.{evidence.dimension}: {evidence.reason}"


def _collapse(comparison: Comparison, measured: Mapping[str, Measured], seed: int) -> tuple[Finding, ...]:
    found = [(name, measured[name]) for name in COLLAPSE if name in measured]
    family = len(found) + 1
    kept = tuple(_kept(name, value, family, _narrowest(comparison) if name == "variance" else ()) for name, value in found)
    repeated = duplication(comparison, seed)
    return (*kept, _shared(_Repetition("duplication", "collapse", "of the rows repeat another row", COLLAPSE_BANDS), repeated, family))


_KEPT: Final = {
    "tail_mass": "of the mass in the reference's tails and rare categories is kept",
    "variance": "of the columns' variance is kept (geometric mean)",
    "covariance": "of the volume per column is kept (determinant of the covariance)",
    "entropy": "of the effective number of categories is kept",
    "support": "of the reference's bins and categories are occupied",
    "recall": "of the reference lies among the candidate's neighbourhoods",
}


def _kept(name: str, value: Measured, family: int, columns: tuple[str, ...]) -> Finding:
    """A log share becomes the share kept, relative to what healthy halves keep."""
    p_value = value.lower_p
    share = math.exp(value.excess)
    severity = COLLAPSE_BANDS.severity(1 - share, p_value * family)
    low, high = (math.exp(end - value.expected) for end in value.interval)
    return Finding(
        Evidence(
            dimension=name,
            axis="collapse",
            statistic=share,
            interval=(low, high),
            null_p_value=p_value,
            passed=severity is Severity.NONE,
            reason=f"{share:.1%} {_KEPT[name]} (95 % interval {low:.1%} to {high:.1%}, p = {p_value:.2g}).",
            columns=columns if severity else (),
        ),
        severity,
    )


@dataclass(frozen=True, slots=True)
class _Repetition:
    """A dimension that is a share of repeated rows."""

    name: str
    axis: Literal["collapse", "copying"]
    meaning: str
    bands: Bands


def _shared(dimension: _Repetition, share: Share, family: int) -> Finding:
    severity = dimension.bands.severity(share.excess, share.p_value * family)
    healthy = f"healthy data of this size shows {share.expected:.1%} (p = {share.p_value:.2g})"
    return Finding(
        Evidence(
            dimension=dimension.name,
            axis=dimension.axis,
            statistic=share.value,
            interval=share.interval,
            null_p_value=share.p_value,
            passed=severity is Severity.NONE,
            reason=f"{share.value:.1%} {dimension.meaning}; {healthy}.",
        ),
        severity,
    )


def _copying(comparison: Comparison, seed: int) -> tuple[Finding, ...]:
    exact = _Repetition("exact_copies", "copying", "of the rows stand in the reference", COPYING_BANDS)
    near = _Repetition("near_copies", "copying", "of the rows lie far closer to a reference row than its own rows do", COPYING_BANDS)
    shares = ((exact, exact_copies(comparison, seed)), (near, near_copies(comparison, seed)))
    return tuple(_shared(dimension, share, len(shares)) for dimension, share in shares if share is not None)


def _drift(comparison: Comparison, measured: Mapping[str, Measured]) -> tuple[Finding, ...]:
    found = [(name, measured[name]) for name in DRIFT if name in measured]
    return tuple(_moved(name, value, len(found), _most_shifted(comparison)) for name, value in found)


_MOVED: Final = {
    "marginal_shift": "is the largest distance between a column's two distributions",
    "missing_shift": "is the largest change of a column's share of missing values",
}


def _moved(name: str, value: Measured, family: int, columns: tuple[str, ...]) -> Finding:
    p_value = value.upper_p
    severity = DRIFT_BANDS.severity(value.excess, p_value * family)
    return Finding(
        Evidence(
            dimension=name,
            axis="drift",
            statistic=value.value,
            interval=value.interval,
            null_p_value=p_value,
            passed=severity is Severity.NONE,
            reason=f"{value.value:.3f} {_MOVED[name]}; healthy halves show {value.expected:.3f} (p = {p_value:.2g}).",
            columns=columns if severity else (),
        ),
        severity,
    )


def _narrowest(comparison: Comparison) -> tuple[str, ...]:
    ratios = column_log_variance(Pair(comparison.candidate, comparison.reference))
    return tuple(comparison.columns.numeric[index] for index in np.argsort(ratios, kind="stable")[:_REPORTED_COLUMNS])


def _most_shifted(comparison: Comparison) -> tuple[str, ...]:
    shifts = np.asarray(column_shifts(Pair(comparison.candidate, comparison.reference)))
    return tuple(comparison.columns.names[index] for index in np.argsort(-shifts, kind="stable")[:_REPORTED_COLUMNS])
