"""The texts that are indexed for a memory: who said it and when belongs to what is searched.

Bare text without them costs much recall on conversations, and a second view with the two turns before it gains some
(docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tessera.memory.domain.records import Turn

NEIGHBOURS: Final = 2
"""Memories before this one that its context holds."""
CONTEXT_CHARACTERS: Final = 900
"""Longest context with what came before; the embedding model reads about this much and cuts the end, where the memory itself stands."""


def alone(turn: Turn) -> str:
    """`4 May 2023 Maria: text`; a chunk has its document's title instead of a speaker."""
    return f"{_dated(turn)} {_voiced(turn)}"


def context(turn: Turn, before: Sequence[Turn]) -> str:
    """The same after what came just before it, oldest first."""
    own = alone(turn)
    earlier = "\n".join(_voiced(one) for one in before[-NEIGHBOURS:])
    room = CONTEXT_CHARACTERS - len(own) - 1
    return f"{earlier[-room:]}\n{own}" if earlier and room > 0 else own


def _dated(turn: Turn) -> str:
    return f"{turn.occurred_at.day} {turn.occurred_at:%B %Y}"


def _voiced(turn: Turn) -> str:
    lead = turn.said_by or turn.title
    return f"{lead}: {turn.text}" if lead else turn.text
