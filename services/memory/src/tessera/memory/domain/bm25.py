"""BM25 as an inner product: saturated term frequencies in the document, inverse document frequencies in the query.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework (2009), with the never negative inverse document frequency
that Lucene uses. The length that documents are compared with is a constant per view instead of the running average, so that a row
depends on its own texts alone: built again from the log in any order, the index is the same. On conversations the
difference was below a point of recall.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tessera.memory.domain.records import View

SATURATION: Final = 1.2
"""k1: how soon a repeated term stops adding."""
LENGTH_WEIGHT: Final = 0.75
"""b: how much a long text is discounted."""
PIVOT_LENGTHS: Final[Mapping[View, float]] = {"alone": 32.0, "context": 96.0}
"""Terms of a text of usual length in each view."""
MAXIMUM_TERMS: Final = 4_000
"""Distinct terms kept of one text, the most frequent; a sparse vector has an upper bound and no readable text reaches this one."""


@dataclass(frozen=True, slots=True)
class TermStatistics:
    """Of one tenant and view: how many memories are indexed, and how many hold each term."""

    memories: int
    holding: Mapping[int, int]


def document_weights(counts: Mapping[int, int], view: View) -> dict[int, float]:
    """The saturated frequency of each term: above 0, below k1 + 1, growing with the count."""
    kept = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAXIMUM_TERMS])
    length = sum(counts.values())
    norm = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * length / PIVOT_LENGTHS[view])
    return {term: count * (SATURATION + 1) / (count + norm) for term, count in kept.items()}


def query_weights(counts: Mapping[int, int], statistics: TermStatistics) -> dict[int, float]:
    """The inverse document frequency of each known term of a query; terms that no memory holds are left out."""
    return {term: inverse_frequency(statistics.memories, holding) for term in counts if (holding := statistics.holding.get(term, 0)) > 0}


def inverse_frequency(memories: int, holding: int) -> float:
    """Above 0; the rarer the term the larger."""
    holding = min(holding, memories)
    return math.log(1 + (memories - holding + 0.5) / (holding + 0.5))
