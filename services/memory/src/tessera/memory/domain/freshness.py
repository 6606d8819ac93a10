"""By what the memories that a read waits for can be found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tessera.contracts.events import SearchStage

Tasks = Mapping[SearchStage, int]


@dataclass(frozen=True, slots=True)
class Indexing:
    """Index work of new memories that is left in one snapshot. Numbers of tasks grow in the order in which they were asked for."""

    awaited: frozenset[SearchStage] = frozenset()
    """Stages in which a memory of an awaited event is still to be indexed."""
    oldest: Tasks = field(default_factory=dict)
    """The tenant's oldest task of each stage; none where nothing is left."""
    newest: Tasks = field(default_factory=dict)

    def left_up_to(self, horizon: Tasks) -> frozenset[SearchStage]:
        """The stages that have not done everything up to the `horizon`."""
        return frozenset(stage for stage, oldest in self.oldest.items() if oldest <= horizon.get(stage, 0))


def searchable(left: frozenset[SearchStage]) -> SearchStage | None:
    """How well something can be found of which these stages are left: by its meaning too, by its words, or not at all."""
    if "words" in left:
        return None
    return "words" if "vectors" in left else "vectors"


def suffices(found: SearchStage | None, wanted: SearchStage | None) -> bool:
    """Whether what can be found so can be found as wanted; None where it need not be found at all."""
    return wanted is None or found in ("vectors", wanted)
