"""Tokens, and the content-addressed vocabulary."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tessera.contracts.base import EventData, Name, RequestData, Text

CompositionId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="32 bytes in hexadecimal.")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextTokenized(EventData):
    """The tokens of a recorded memory."""

    event_type: ClassVar[str] = "tessera.text.tokenized.v1"

    memory_id: Name
    encoding: Name
    tokens: tuple[TokenId, ...]
    composition_id: CompositionId


class TokenizationRequested(RequestData):
    """Encode a text, or decode tokens or a composition: exactly one of the three is given."""

    event_type: ClassVar[str] = "tessera.tokenization.requested.v1"

    encoding: Name
    text: Annotated[Text | None, Field(max_length=100_000)] = None
    tokens: Annotated[tuple[TokenId, ...] | None, Field(max_length=100_000)] = None
    composition_id: CompositionId | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizationRequested:
        if sum(value is not None for value in (self.text, self.tokens, self.composition_id)) != 1:
            raise ValueError("give exactly one of text, tokens and composition_id")
        return self


class TokenizationCompleted(EventData):
    """Text, its tokens and, where it was stored, its composition."""

    event_type: ClassVar[str] = "tessera.tokenization.completed.v1"

    operation: Literal["encode", "decode"]
    encoding: Name
    text: Text
    tokens: tuple[TokenId, ...]
    composition_id: CompositionId | None = None
