"""Other names of models: the operator's aliases and patterns.

A declared id always means itself. Any other name is looked up among the aliases, then among the patterns: the pattern with the most
characters besides `*` goes first, and of equals the one that sorts first, so that the order in which they are written means nothing.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Final

WILDCARD: Final = "*"
LOCAL: Final = "local/"
"""Engines of the platform itself: no pattern takes one's name by accident."""


class ModelNames:
    """What names that are not declared ids stand for."""

    def __init__(self, targets: Mapping[str, str] | None = None) -> None:
        """`targets` maps aliases, and patterns with `*` for any characters, to declared ids. Raises ValueError for what cannot be meant."""
        given = dict(targets or {})
        self.aliases: Mapping[str, str] = {name: target for name, target in sorted(given.items()) if WILDCARD not in name}
        self._targets = given
        for name, target in given.items():
            _check(name, target, given)

    def target(self, name: str) -> str | None:
        """The declared id that `name` stands for, whether or not such a model is on offer; None where it stands for none."""
        if name in self.aliases:
            return self.aliases[name]
        return next((target for pattern, target in self._patterns if pattern.fullmatch(name)), None)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        patterns = sorted((name for name in self._targets if WILDCARD in name), key=lambda name: (-_literal_length(name), name))
        return [(_compiled(pattern), self._targets[pattern]) for pattern in patterns]


def _check(name: str, target: str, targets: Mapping[str, str]) -> None:
    if not name or not target:
        raise ValueError("a name and the model that it stands for must not be empty")
    if WILDCARD in target:
        raise ValueError(f"'{name}' must stand for one model, not for the pattern '{target}'")
    if target in targets:
        raise ValueError(f"'{name}' stands for '{target}', which is an alias itself: name the declared model")


def _literal_length(pattern: str) -> int:
    return len(pattern) - pattern.count(WILDCARD)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Any characters for each `*`; `local/…` only for a pattern that begins so."""
    guard = "" if pattern.startswith(LOCAL) else f"(?!{LOCAL})"
    return re.compile(guard + ".*".join(map(re.escape, pattern.split(WILDCARD))), re.DOTALL)
