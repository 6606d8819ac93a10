"""One order out of four views of likeness and two small priors.

Each view (vector and lexical, of the memory alone and in its context) is scaled to 0..1 between its least and greatest value over
everything that was searched, then weighted and summed. Fused scores of several views of a conversation turn found clearly more
than reciprocal ranks did (docs/memory.md). Importance and recency are small on purpose: they part near ties and
never beat a match.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Generic, TypeVar

from tessera.contracts.events import RecallScores

RELEVANCE: Final = 0.95
"""Share of the four views; halved between vector and lexical, all lexical where no vectors could be compared."""
IMPORTANCE: Final = 0.03
RECENCY: Final = 0.02
ALONE: Final = 0.55
"""Share of the memory by itself within vector and lexical; the rest is its context's, which its neighbours share with it."""
HALF_LIFE: Final = timedelta(days=30)
"""After this time the recency term is half of what it was."""

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the greatest value of one view over everything searched."""

    least: float
    greatest: float

    def scaled(self, value: float) -> float:
        """`value` within 0..1; 0 where all values are equal."""
        width = self.greatest - self.least
        return min(1.0, max(0.0, (value - self.least) / width)) if width > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One number of the memory alone and one of the memory in its context."""

    alone: float
    context: float

    @property
    def best(self) -> float:
        """The larger one."""
        return max(self.alone, self.context)


@dataclass(frozen=True, slots=True)
class Candidate(Generic[K]):
    """A memory that at least one view put forward. `vector` holds cosines, `lexical` BM25 scores; None where not compared or matched."""

    key: K
    vector: Pair | None
    lexical: Pair | None
    importance: float
    occurred_at: datetime


@dataclass(frozen=True, slots=True)
class Extent:
    """Bounds of the four views."""

    vector_alone: Bounds
    vector_context: Bounds
    lexical_alone: Bounds
    lexical_context: Bounds


@dataclass(frozen=True, slots=True)
class Ranked(Generic[K]):
    """A candidate with the parts of its score; the parts add up to the total."""

    key: K
    scores: RecallScores


def fused(candidates: Sequence[Candidate[K]], extent: Extent, *, vectors: bool, now: datetime, limit: int) -> list[Ranked[K]]:
    """The best `limit` candidates, best first; equal totals keep the order given. `vectors` says whether vectors were compared at all."""
    share = RELEVANCE / 2 if vectors else RELEVANCE
    parts = [_Parts(share * _vector(one, extent) if vectors else 0.0, share * _lexical(one, extent)) for one in candidates]
    by_vector = _ranks([part.vector if one.vector else None for part, one in zip(parts, candidates, strict=True)])
    by_lexical = _ranks([part.lexical if one.lexical else None for part, one in zip(parts, candidates, strict=True)])
    ranked = [
        Ranked(one.key, _scores(one, replace(parts[index], vector_rank=by_vector.get(index), lexical_rank=by_lexical.get(index)), now))
        for index, one in enumerate(candidates)
    ]
    return sorted(ranked, key=lambda one: -one.scores.total)[:limit]


@dataclass(frozen=True, slots=True)
class _Parts:
    vector: float
    lexical: float
    vector_rank: int | None = None
    lexical_rank: int | None = None


def recency(occurred_at: datetime, now: datetime) -> float:
    """1 for now and the future, half after each half-life."""
    age = max(0.0, (now - occurred_at).total_seconds())
    return math.exp(-math.log(2) * age / HALF_LIFE.total_seconds())


def _vector(candidate: Candidate[K], extent: Extent) -> float:
    if candidate.vector is None:
        return 0.0
    return _blended(extent.vector_alone.scaled(candidate.vector.alone), extent.vector_context.scaled(candidate.vector.context))


def _lexical(candidate: Candidate[K], extent: Extent) -> float:
    if candidate.lexical is None:
        return 0.0
    return _blended(extent.lexical_alone.scaled(candidate.lexical.alone), extent.lexical_context.scaled(candidate.lexical.context))


def _blended(alone: float, context: float) -> float:
    return ALONE * alone + (1 - ALONE) * context


def _scores(candidate: Candidate[K], parts: _Parts, now: datetime) -> RecallScores:
    important, recent = IMPORTANCE * candidate.importance, RECENCY * recency(candidate.occurred_at, now)
    return RecallScores(
        total=parts.vector + parts.lexical + important + recent,
        vector=parts.vector,
        lexical=parts.lexical,
        importance=important,
        recency=recent,
        vector_similarity=candidate.vector.best if candidate.vector else None,
        lexical_score=candidate.lexical.best if candidate.lexical else None,
        vector_rank=parts.vector_rank,
        lexical_rank=parts.lexical_rank,
    )


def _ranks(parts: Sequence[float | None]) -> Mapping[int, int]:
    """Places counted from 1 among those that have a part; equal parts keep the order given."""
    present = [index for index, part in enumerate(parts) if part is not None]
    return {index: place for place, index in enumerate(sorted(present, key=lambda index: -(parts[index] or 0.0)), start=1)}
