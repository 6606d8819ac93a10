"""What an operator can set about the tokenizer."""

from __future__ import annotations

from typing import ClassVar, Literal

from tessera.bus.settings import ServiceSettings


class TokenizerSettings(ServiceSettings, service="tokenizer"):
    """The tokenizer's settings."""

    postgres_required: ClassVar[bool] = False  # prompts are counted without it

    memory_encoding: Literal["cl100k_base", "o200k_base"] = "o200k_base"
    """What recorded memories are tokenized in, and so what the n-gram engine learns."""
