"""What one generation has said so far, and the chunks of it that were sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic import JsonValue

from tessera.contracts import FinishReason
from tessera.generator.domain.pieces import Delta, Piece, Said, TokenFigures, merged
from tessera.generator.domain.stopping import StopScanner

MAXIMUM_TEXT_CHARACTERS: Final = 200_000
"""A completion must fit into one event; what is longer ends with `length`."""


class ChoiceTranscript:
    """One choice: what it has said, and how it ended."""

    def __init__(self, stops: Sequence[str], maximum_characters: int) -> None:
        self._scanner = StopScanner(stops)
        self._text: list[str] = []
        self._length = 0
        self._maximum = maximum_characters
        self.message: Delta = {}
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """Everything that may be shown."""
        return "".join(self._text)

    @property
    def ended(self) -> bool:
        """A stop sequence is complete, or the text as long as one may be: nothing more is shown."""
        return self._scanner.stopped or self._length >= self._maximum

    def take(self, piece: Piece) -> Said:
        """Take one piece; what of it may be shown now. After the end nothing counts any more."""
        if self.ended:
            return Said(choice=piece.choice)
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.message = merged(self.message, piece.delta)
        return Said(self._show(self._scanner.feed(piece.text.replace("\x00", "\ufffd"))), piece.delta, piece.choice)

    def finish(self) -> str:
        """The engine has ended: what was held back, because it might have begun a stop sequence, may be shown after all."""
        return self._show(self._scanner.finish())

    def _show(self, text: str) -> str:
        shown = text[: self._maximum - self._length]
        self._length += len(shown)
        self._text.append(shown)
        if self.ended:
            self.finish_reason = "stop" if self._scanner.stopped else "length"
        return shown


class Transcript:
    """Takes an engine's pieces; knows what each choice said, and who counted the tokens of all."""

    def __init__(self, stops: Sequence[str] = (), choices: int = 1) -> None:
        self.choices = tuple(ChoiceTranscript(stops, MAXIMUM_TEXT_CHARACTERS // choices) for _ in range(choices))
        self.figures: TokenFigures | None = None
        self.source_ids: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Everything of the first choice that may be shown."""
        return self.choices[0].text

    @property
    def started(self) -> bool:
        """Some choice has said something."""
        return any(choice.text for choice in self.choices)

    @property
    def ended(self) -> bool:
        """No choice shows anything more: the engine need not go on."""
        return all(choice.ended for choice in self.choices)

    def take(self, piece: Piece) -> Said:
        """Take one piece; what of it may be shown now. U+0000, which no event may hold, becomes U+FFFD."""
        self.figures = piece.figures or self.figures
        self.source_ids = piece.source_ids or self.source_ids
        return self.choices[piece.choice].take(piece)

    def finish(self) -> list[Said]:
        """The engine has ended: what was held back may be shown after all."""
        return [Said(choice.finish(), choice=index) for index, choice in enumerate(self.choices)]


@dataclass(frozen=True)
class Chunk:
    """One coalesced piece as it is sent."""

    index: int
    text_offset: int
    text: str
    delta: Mapping[str, JsonValue] = field(default_factory=dict)
    choice: int = 0


@dataclass(frozen=True)
class Progress:
    """What was recorded as sent, before it was sent: the last chunk may or may not have reached the log.

    `text` is the first choice's: only engines that give one choice are taken over after they began. `further` are the characters sent of
    other choices, which nothing but the next chunk needs.
    """

    last_index: int = -1
    last_offset: int = 0
    text: str = ""
    further: Mapping[int, int] = field(default_factory=dict)

    @property
    def started(self) -> bool:
        """A reader may have seen text."""
        return self.last_index >= 0

    def next_chunk(self, said: Said) -> Chunk:
        """The chunk that follows."""
        offset = len(self.text) if said.choice == 0 else self.further.get(said.choice, 0)
        return Chunk(self.last_index + 1, offset, said.text, said.delta, said.choice)

    def after(self, chunk: Chunk) -> Progress:
        """The progress once `chunk` counts as sent."""
        if chunk.choice == 0:
            return Progress(chunk.index, chunk.text_offset, self.text + chunk.text, self.further)
        further = {**self.further, chunk.choice: chunk.text_offset + len(chunk.text)}
        return Progress(chunk.index, self.last_offset, self.text, further)

    def last_chunk(self) -> Chunk:
        """The last chunk again, for a reader that may have missed it."""
        return Chunk(self.last_index, self.last_offset, self.text[self.last_offset :])
