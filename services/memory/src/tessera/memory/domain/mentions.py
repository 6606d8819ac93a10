"""Which entities a text names: names and aliases as whole words, whatever the case."""

from __future__ import annotations

import re
from typing import Final

LONGEST_NAME_WORDS: Final = 6
"""Longer names are kept but not looked for."""

_WORD: Final = re.compile(r"[^\W_]+")


def normalised(name: str) -> str:
    """The name's words in lower case with single spaces; empty for a name without letters and digits."""
    return " ".join(_WORD.findall(name.casefold()))


def phrases(text: str, longest: int = LONGEST_NAME_WORDS) -> set[str]:
    """Every run of up to `longest` words of the text, normalised: a name is mentioned if its normal form is among them."""
    words = _WORD.findall(text.casefold())
    return {" ".join(words[start : start + length]) for length in range(1, longest + 1) for start in range(len(words) - length + 1)}


def names_of(name: str, aliases: tuple[str, ...]) -> set[str]:
    """The normal forms under which an entity is looked for."""
    found = {normalised(candidate) for candidate in (name, *aliases)}
    return {candidate for candidate in found if candidate and candidate.count(" ") < LONGEST_NAME_WORDS}


def mentions(text: str, names: set[str]) -> bool:
    """Whether the text holds one of these normal forms as whole words."""
    padded = f" {normalised(text)} "
    return any(f" {name} " in padded for name in names)
