"""Sampling follows the distribution, and is repeatable."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.generator.domain.kneser_ney import Distribution
from tessera.generator.domain.sampling import SamplingParameters, sample

pytestmark = pytest.mark.unit


def distribution(*probabilities: float) -> Distribution:
    return Distribution(np.arange(10, 10 + len(probabilities)), np.array(probabilities), 1 - sum(probabilities))


def drawn(of: Distribution, parameters: SamplingParameters, times: int = 20_000) -> dict[int, float]:
    generator = random.Random(7)
    counts = Counter(sample(of, parameters, generator.random()) for _ in range(times))
    return {token: count / times for token, count in counts.items()}


def test_temperature_one_draws_in_proportion() -> None:
    frequencies = drawn(distribution(0.5, 0.3, 0.1), SamplingParameters())
    assert frequencies == pytest.approx({10: 5 / 9, 11: 3 / 9, 12: 1 / 9}, abs=0.015)


def test_temperature_zero_takes_the_most_probable_and_the_lower_of_equals() -> None:
    assert drawn(distribution(0.2, 0.4, 0.4), SamplingParameters(temperature=0), 50) == {11: 1.0}


def test_temperature_two_draws_by_square_roots() -> None:
    frequencies = drawn(distribution(0.64, 0.16), SamplingParameters(temperature=2))
    assert frequencies == pytest.approx({10: 2 / 3, 11: 1 / 3}, abs=0.015)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    assert set(drawn(distribution(0.5, 0.3, 0.2), SamplingParameters(top_p=0.79), 500)) == {10, 11}
    assert set(drawn(distribution(0.5, 0.3, 0.2), SamplingParameters(top_p=0.01), 500)) == {10}


@given(
    st.lists(st.floats(1e-12, 1), min_size=1, max_size=9),
    st.floats(0, 2),
    st.floats(0.01, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_every_draw_is_a_token_of_the_vocabulary(weights: list[float], temperature: float, top_p: float, uniform: float) -> None:
    total = sum(weights) * 1.1
    token = sample(distribution(*(weight / total for weight in weights)), SamplingParameters(temperature, top_p), uniform)
    assert 10 <= token < 10 + len(weights)
