"""Counting with tessera.encodings, without blocking the loop."""

from __future__ import annotations

import asyncio
from typing import Final

from tessera.encodings import encoding

_INLINE_CHARACTERS: Final = 8_000
"""About a millisecond of work; anything longer goes to a thread."""


class EncodingCounter:
    """Counts tokens of texts, lone surrogates (which cannot be encoded) as U+FFFD."""

    async def count(self, encoding_name: str, text: str) -> int:
        """The number of tokens of `text`. Raises UnknownEncodingError."""
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        if len(clean) <= _INLINE_CHARACTERS:
            return encoding(encoding_name).count(clean)
        return await asyncio.to_thread(encoding(encoding_name).count, clean)
