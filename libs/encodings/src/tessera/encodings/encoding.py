"""An encoding: text to tokens and back, counted and cut."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Literal

import tiktoken

from tessera.encodings import chunking, ranks
from tessera.encodings.chunking import Chunk
from tessera.encodings.errors import IncompleteTextError, UnencodableTextError, UnknownEncodingError, UnknownTokenError

ENCODING_NAMES = ("cl100k_base", "o200k_base")

# Within one call a cut reads no more than this many characters per allowed token at first; texts rarely have longer tokens on average.
_CHARACTERS_PER_TOKEN = 16


class Encoding:
    """One of tiktoken's encodings. Immutable and thread-safe; every method is pure CPU work."""

    def __init__(self, base: tiktoken.Encoding) -> None:
        self._base = base

    @property
    def name(self) -> str:
        """The name that tiktoken gives it, such as "o200k_base"."""
        return self._base.name

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; special tokens in it are plain text.

        `decode(encode(text)) == text` for every text. Raises UnencodableTextError on a lone surrogate.
        """
        _refuse_surrogates(text)
        return self._base.encode_ordinary(text)

    def count(self, text: str) -> int:
        """The number of tokens of `text`. Raises as encode does."""
        return len(self.encode(text))

    def decode(self, tokens: Sequence[int], *, errors: Literal["strict", "replace"] = "strict") -> str:
        """The text of `tokens`.

        Raises UnknownTokenError, and, when strict, IncompleteTextError where they do not form whole characters ("replace" puts U+FFFD).
        """
        try:
            return self.decode_bytes(tokens).decode("utf-8", errors=errors)
        except UnicodeDecodeError as error:
            raise IncompleteTextError(f"the tokens are not whole characters: {error.reason} at byte {error.start}") from error

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of `tokens`, special tokens included. Raises UnknownTokenError."""
        try:
            return self._base.decode_bytes(tokens)
        except (KeyError, OverflowError) as error:
            unknown = next((token for token in tokens if not self._known(token)), None)
            raise UnknownTokenError(f"{self.name} has no token {unknown}") from error

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Raises UnknownTokenError."""
        return self.decode_bytes([token])

    def ordinary_tokens(self) -> Iterator[tuple[int, bytes]]:
        """Every ordinary (not special) token with its bytes, in no promised order."""
        return ((self._base.encode_single_token(token), token) for token in self._base.token_byte_values())

    def cut(self, text: str, limit_tokens: int) -> str:
        """The longest prefix, up to a token's border, that counts at most `limit_tokens`; never splits a character."""
        if limit_tokens <= 0:
            return ""
        considered = text[: limit_tokens * _CHARACTERS_PER_TOKEN]
        while (end := self._window(considered).end_of(0, limit_tokens)) == len(considered) < len(text):
            considered = text[: 2 * len(considered)]
        return text[:end]

    def chunks(self, text: str, size: int, overlap: int = 0) -> list[Chunk]:
        """Pieces of at most `size` tokens each, neighbours sharing about `overlap` tokens; together they cover the text.

        A piece ends at a paragraph, line, sentence or word where one ends within its last quarter, and never inside a character.
        Raises ValueError where size < 4 or overlap > size / 2, and as encode does.
        """
        return chunking.split(self._window(text), size, overlap)

    def _window(self, text: str) -> chunking.Window:
        _, starts = self._base.decode_with_offsets(self.encode(text))
        return chunking.Window(text, starts, self.count)

    def _known(self, token: int) -> bool:
        try:
            self._base.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return False
        return True


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnencodableTextError(f"lone surrogate at character {error.start}") from error


_loaded: dict[str, Encoding] = {}
_loading = threading.Lock()


def encoding(name: str) -> Encoding:
    """The encoding `name`, loaded once per process (0.2 to 0.4 s, blocking). Raises UnknownEncodingError, CorruptRanksError."""
    if name not in ENCODING_NAMES:
        raise UnknownEncodingError(f"unknown encoding {name!r}; known: {', '.join(ENCODING_NAMES)}")
    with _loading:
        if name not in _loaded:
            _loaded[name] = Encoding(ranks.build(name))
        return _loaded[name]
