"""How much a memory matters, from 0 to 1, before anybody has asked for it.

The rule follows the conversational memory layer that Tessera replaces (role weights: system 0.9, user 0.7, assistant 0.5)
without two of its faults. Age is no part of the stored number, which there was computed once and never again, so that a fresh
user message could reach 0.54 at most; here it is a term of its own at recall. And an explicit importance replaces the prior on
every path.
"""

from __future__ import annotations

from typing import Final

from tessera.contracts.events import MemoryKind, Role

ROLE_PRIORS: Final[dict[Role, float]] = {"system": 0.9, "user": 0.7, "assistant": 0.5, "tool": 0.5}
KIND_PRIORS: Final[dict[MemoryKind, float]] = {"message": 0.5, "chunk": 0.6, "entity": 0.8, "relation": 0.6}


def importance(kind: MemoryKind, role: Role | None = None, explicit: float | None = None) -> float:
    """`explicit` where the producer gave one, else the prior of the role, else of the kind. Always within 0 to 1."""
    if explicit is not None:
        return min(1.0, max(0.0, explicit))
    return KIND_PRIORS[kind] if role is None else ROLE_PRIORS[role]
