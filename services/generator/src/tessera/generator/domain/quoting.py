"""The quote engine: answers only with sentences that memory holds, each with its source."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

MAXIMUM_QUOTES: Final = 3
NOTHING_FOUND: Final = "Memory holds nothing on this."
NOT_ASKED: Final = (
    "This model answers only with sentences from recalled memories, and none were recalled for this request. Ask for memory with it."
)

_WORD: Final = re.compile(r"\w+")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+|(?<=[。！？])|\n+")
_FUNCTION_WORDS: Final = frozenset(
    [
        "a",
        "about",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "how",
        "i",
        "if",
        "in",
        "is",
        "it",
        "its",
        "me",
        "my",
        "no",
        "not",
        "of",
        "on",
        "or",
        "our",
        "she",
        "should",
        "so",
        "tell",
        "that",
        "the",
        "their",
        "them",
        "there",
        "they",
        "this",
        "to",
        "us",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)
_IDEOGRAPH: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True)
class Source:
    """One recalled memory."""

    memory_id: str
    text: str


@dataclass(frozen=True)
class Quote:
    """One sentence of a memory, verbatim."""

    memory_id: str
    sentence: str

    def __str__(self) -> str:
        return f"“{self.sentence}” [memory:{self.memory_id}]"


def quotes(question: str, sources: Sequence[Source]) -> list[Quote]:
    """The sentences that share the most telling words with the question, best first; none where no word is shared.

    A word tells the more the fewer sentences hold it; long sentences gain nothing from their length. Equal scores keep
    the order of recall.
    """
    sentences = [Quote(source.memory_id, sentence) for source in sources for sentence in split_sentences(source.text)]
    wanted = terms(question)
    bags = [terms(quote.sentence) for quote in sentences]
    spread = Counter(term for bag in bags for term in bag)
    scored = [(_score(wanted & bag, len(bag), spread, len(bags)), quote) for bag, quote in zip(bags, sentences, strict=True)]
    found = sorted((item for item in scored if item[0] > 0), key=lambda item: -item[0])
    return _distinct(quote for _, quote in found)[:MAXIMUM_QUOTES]


def split_sentences(text: str) -> list[str]:
    """The sentences and lines of a text, trimmed, without empty ones."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def terms(text: str) -> set[str]:
    """The words of a text that carry meaning, in lower case; characters of scripts without spaces count one by one."""
    words = (word for word in _WORD.findall(text.casefold()) if word not in _FUNCTION_WORDS)
    return {term for word in words for term in _split_word(word)}


def _split_word(word: str) -> Iterable[str]:
    return list(word) if _IDEOGRAPH.search(word) else [_stem(word)]


def _stem(word: str) -> str:
    """Plural and possessive forms of English meet their stem; anything more would be guessing."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _score(shared: set[str], length: int, spread: Counter[str], total: int) -> float:
    return sum(math.log(1 + total / spread[term]) for term in shared) / math.sqrt(max(length, 1))


def _distinct(found: Iterable[Quote]) -> list[Quote]:
    """The first of several sentences that say the same."""
    by_sentence: dict[str, Quote] = {}
    for quote in found:
        by_sentence.setdefault(quote.sentence.casefold(), quote)
    return list(by_sentence.values())
