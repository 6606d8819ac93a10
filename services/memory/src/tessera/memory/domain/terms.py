"""From text to the terms that the lexical index counts."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final

import Stemmer  # type: ignore[import-not-found]

DIMENSIONS: Final = 2**29
"""Hashed terms; at a million distinct terms one in a thousand shares its number with another."""

_FUNCTION_WORDS: Final = """
    a about am an and are as at be been but by can could did do does doing for from had has have having he her hers him his
    how i if in into is it its just me my no nor not of off on or our ours she should so some such than that the their
    theirs them then there these they this those to too up us was we were what when where which while who whom whose why
    will with would you your yours
"""
FUNCTION_WORDS: Final = frozenset(_FUNCTION_WORDS.split())
"""English words that carry a sentence and not its subject. Questions consist of them for a good part, so they would match everything."""

_WORD: Final = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Scripts written without spaces: hiragana, katakana, CJK ideographs with their extensions, Thai.
_UNSPACED: Final = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+")
_POSSESSIVE: Final = re.compile(r"['’]s$")
_STEMMER: Final = Stemmer.Stemmer("english")


def terms(text: str) -> Counter[int]:
    """How often each hashed term occurs: stemmed words without function words; pairs of characters in scripts without spaces."""
    return Counter(hashed(term) for word in _words(text) for term in _terms_of(word))


def _words(text: str) -> Iterator[str]:
    return (_POSSESSIVE.sub("", match.group()) for match in _WORD.finditer(text.casefold()))


def _terms_of(word: str) -> Iterator[str]:
    spaced = _UNSPACED.sub(" ", word).split()
    yield from (_STEMMER.stemWord(part) for part in spaced if part not in FUNCTION_WORDS)
    for match in _UNSPACED.finditer(word):
        yield from _pairs(match.group())


def _pairs(run: str) -> list[str]:
    return [run[index : index + 2] for index in range(len(run) - 1)] or [run]


@lru_cache(maxsize=65_536)
def hashed(term: str) -> int:
    """A term's dimension, counted from 1 as pgvector does; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "big") % DIMENSIONS + 1


def sparse_text(weights: Mapping[int, float]) -> str:
    """The text form of pgvector's sparsevec."""
    return "{" + ",".join(f"{dimension}:{weight:.6g}" for dimension, weight in sorted(weights.items())) + "}/" + str(DIMENSIONS)
