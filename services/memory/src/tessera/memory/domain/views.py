"""The texts that are indexed for a memory: who said it and when belongs to what is searched.

Bare text cost the embedding model over 20 points of recall on conversations; a second view with the two turns before it gained some ten more
(docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tessera.memory.domain.records import Turn

NEIGHBOURS: Final = 2
"""Memories before this one that its context holds."""


def alone(turn: Turn) -> str:
    """`4 May 2023 Maria: text`; a chunk has its document's title instead of a speaker."""
    return f"{_dated(turn)} {_voiced(turn)}"


def context(turn: Turn, before: Sequence[Turn]) -> str:
    """The same after what came just before it, oldest first."""
    return "\n".join([*(_voiced(earlier) for earlier in before[-NEIGHBOURS:]), alone(turn)])


def _dated(turn: Turn) -> str:
    return f"{turn.occurred_at.day} {turn.occurred_at:%B %Y}"


def _voiced(turn: Turn) -> str:
    lead = turn.said_by or turn.title
    return f"{lead}: {turn.text}" if lead else turn.text
