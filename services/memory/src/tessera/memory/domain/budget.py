"""Fitting recalled memories into a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def within_budget(ranked: Iterable[T], size: Callable[[T], int], budget: int) -> list[T]:
    """The best that fit together, in their order. One that does not fit is passed over: a shorter one behind it may still come in."""
    kept: list[T] = []
    left = budget
    for item in ranked:
        needed = size(item)
        if needed <= left:
            kept.append(item)
            left -= needed
    return kept
