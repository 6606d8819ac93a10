"""What one generation has said so far, and the chunks of it that were sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic import JsonValue

from tessera.contracts import FinishReason
from tessera.generator.domain.pieces import Delta, Piece, TokenFigures, merged
from tessera.generator.domain.stopping import StopScanner

MAXIMUM_TEXT_CHARACTERS: Final = 200_000
"""A completion must fit into one event; what is longer ends with `length`."""


class Transcript:
    """Takes an engine's pieces; applies stop sequences; knows the text, how it ended and who counted its tokens."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._scanner = StopScanner(stops)
        self._text: list[str] = []
        self._length = 0
        self.message: Delta = {}
        self.finish_reason: FinishReason | None = None
        self.figures: TokenFigures | None = None
        self.source_ids: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Everything that may be shown."""
        return "".join(self._text)

    @property
    def ended(self) -> bool:
        """A stop sequence is complete, or the text as long as one may be: nothing more is shown, and the engine need not go on."""
        return self._scanner.stopped or self._length >= MAXIMUM_TEXT_CHARACTERS

    def take(self, piece: Piece) -> str:
        """Take one piece; returns the text that may be shown now. U+0000, which no event may hold, becomes U+FFFD."""
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.message = merged(self.message, piece.delta)
        self.figures = piece.figures or self.figures
        self.source_ids = piece.source_ids or self.source_ids
        return self._show(self._scanner.feed(piece.text.replace("\x00", "\ufffd")))

    def finish(self) -> str:
        """The engine has ended: what was held back, because it might have begun a stop sequence, may be shown after all."""
        return self._show(self._scanner.finish())

    def _show(self, text: str) -> str:
        shown = text[: MAXIMUM_TEXT_CHARACTERS - self._length]
        self._length += len(shown)
        self._text.append(shown)
        if self.ended:
            self.finish_reason = "stop" if self._scanner.stopped else "length"
        return shown


@dataclass(frozen=True)
class Chunk:
    """One coalesced piece as it is sent."""

    index: int
    text_offset: int
    text: str
    delta: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """What was recorded as sent, before it was sent: the last chunk may or may not have reached the log."""

    last_index: int = -1
    last_offset: int = 0
    text: str = ""

    @property
    def started(self) -> bool:
        """A reader may have seen text."""
        return self.last_index >= 0

    def next_chunk(self, text: str, delta: Mapping[str, JsonValue]) -> Chunk:
        """The chunk that follows."""
        return Chunk(self.last_index + 1, len(self.text), text, delta)

    def after(self, chunk: Chunk) -> Progress:
        """The progress once `chunk` counts as sent."""
        return Progress(chunk.index, chunk.text_offset, self.text + chunk.text)

    def last_chunk(self) -> Chunk:
        """The last chunk again, for a reader that may have missed it."""
        return Chunk(self.last_index, self.last_offset, self.text[self.last_offset :])
