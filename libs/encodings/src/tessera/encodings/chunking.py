"""Where a long text is cut, so that each piece stays within a number of tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A character is at most four bytes, and a byte is at most one token: any size from here on makes progress.
MINIMUM_SIZE_TOKENS = 4

# From the best place to end a piece to the least good: paragraph, line, sentence (also Chinese and Japanese), word.
_NATURAL_ENDS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"[.!?…][\"')\]”’]*\s|[。！？]"),
    re.compile(r"\s"),
)
# Only the last quarter of a piece is searched, so that pieces stay near their size.
_SEARCHED_SHARE = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text: text[start:end] (characters), and the number of tokens it encodes to by itself."""

    text: str
    start: int
    end: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """A text with the character at which each of its tokens begins."""

    text: str
    starts: Sequence[int]
    count: Callable[[str], int]

    def end_of(self, start: int, limit_tokens: int) -> int:
        """The furthest end with count(text[start:end]) <= limit_tokens.

        A piece may encode to more tokens by itself than it has within the text, hence the check.
        """
        allowed = limit_tokens
        first = bisect_left(self.starts, start)
        while allowed > 0:
            end = self._character_at(first + allowed)
            excess = self.count(self.text[start:end]) - limit_tokens
            if end > start and excess <= 0:
                return end
            allowed -= max(1, excess)
        return start

    def start_before(self, end: int, overlap_tokens: int) -> int:
        """Where the overlap of `overlap_tokens` tokens before `end` begins; never after `end`, which need not be a token's border."""
        return min(end, self._character_at(max(0, bisect_left(self.starts, end) - overlap_tokens)))

    def _character_at(self, token: int) -> int:
        return self.starts[token] if token < len(self.starts) else len(self.text)


def split(window: Window, size_tokens: int, overlap_tokens: int) -> list[Chunk]:
    """The pieces of the window's text in order; see Encoding.chunks."""
    if size_tokens < MINIMUM_SIZE_TOKENS or not 0 <= overlap_tokens <= size_tokens // 2:
        raise ValueError(f"size must be at least {MINIMUM_SIZE_TOKENS} tokens and overlap at most half of it")
    chunks: list[Chunk] = []
    start = 0
    while start < len(window.text):
        end = _natural_end(window.text, start, _advance(window, start, size_tokens))
        piece = window.text[start:end]
        # A cut at a natural end can, rarely, merge less well than the longer piece did.
        tokens = window.count(piece)
        if tokens > size_tokens:
            end = _advance(window, start, size_tokens)
            piece, tokens = window.text[start:end], window.count(window.text[start:end])
        chunks.append(Chunk(piece, start, end, tokens))
        start = end if end == len(window.text) else max(start + 1, window.start_before(end, overlap_tokens))
    return chunks


def _advance(window: Window, start: int, size_tokens: int) -> int:
    """A single character fits in any allowed size, so a piece is never empty."""
    return max(start + 1, window.end_of(start, size_tokens))


def _natural_end(text: str, start: int, end: int) -> int:
    if end == len(text):
        return end
    earliest = end - (end - start) // _SEARCHED_SHARE
    for pattern in _NATURAL_ENDS:
        ends = [found.end() for found in pattern.finditer(text, earliest, end)]
        if ends:
            return ends[-1]
    return end
