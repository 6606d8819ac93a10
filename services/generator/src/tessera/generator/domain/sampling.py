"""Drawing one token from a distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tessera.generator.domain.kneser_ney import Distribution, Probabilities


@dataclass(frozen=True)
class SamplingParameters:
    """`temperature` 0 takes the most probable token; `top_p` keeps the smallest set of tokens with that much probability."""

    temperature: float = 1.0
    top_p: float = 1.0


def sample(distribution: Distribution, parameters: SamplingParameters, uniform: float) -> int:
    """The token that `uniform` in [0, 1) selects; never the unknown one, which has no text. Ties go to the lower token."""
    if parameters.temperature == 0:
        return int(distribution.vocabulary[int(np.argmax(distribution.probabilities))])
    weights = _nucleus(_tempered(distribution.probabilities, parameters.temperature), parameters.top_p)
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(distribution.vocabulary[min(index, len(weights) - 1)])


def _tempered(probabilities: Probabilities, temperature: float) -> Probabilities:
    with np.errstate(divide="ignore", over="ignore"):  # what is too improbable becomes impossible
        logarithms = np.log(probabilities)
        weights: Probabilities = np.exp((logarithms - logarithms.max()) / temperature)
    total: Probabilities = weights / weights.sum()
    return total


def _nucleus(probabilities: Probabilities, top_p: float) -> Probabilities:
    if top_p >= 1:
        return probabilities
    descending = np.argsort(-probabilities, kind="stable")
    kept = int(np.searchsorted(np.cumsum(probabilities[descending]), top_p)) + 1
    result = np.zeros_like(probabilities)
    result[descending[:kept]] = probabilities[descending[:kept]]
    return result
