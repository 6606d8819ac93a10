"""What a generation asks of memory, and what of the answer fits into its budget."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.contracts.events import ChatMessage, GenerationRequested, RecalledMemory
from tessera.contracts.sealing import opened
from tessera.encodings import UnknownEncodingError, encoding
from tessera.memory.domain.budget import within_budget

FALLBACK_ENCODING = "o200k_base"
"""Counts for models whose encoding is not one of ours; an estimate, as their usage is."""
LONGEST_QUERY_CHARACTERS = 10_000
FRAMING_TOKENS = 12
"""What date, speaker and separators of a quoted memory take at most, besides its text."""


def question(request: GenerationRequested) -> str:
    """What to search for: the query that was given, else the last user message, else the prompt. Empty when there is no text at all."""
    given = request.memory.query if request.memory else None
    asked = given or _last_user_text(request.messages or ()) or (opened(request.prompt) if request.prompt is not None else "")
    # The end of a long text is nearest to what is being asked.
    return asked[-LONGEST_QUERY_CHARACTERS:]


def fitting(memories: Sequence[RecalledMemory], encoding_name: str, token_budget: int) -> list[RecalledMemory]:
    """The memories, in their order, whose texts fit together into the budget, counted in the model's encoding."""
    try:
        counter = encoding(encoding_name)
    except UnknownEncodingError:
        counter = encoding(FALLBACK_ENCODING)
    return within_budget(memories, lambda memory: counter.count(opened(memory.text)) + FRAMING_TOKENS, token_budget)


def _last_user_text(messages: Sequence[ChatMessage]) -> str:
    texts = (_text_of(message) for message in reversed(messages) if message.role == "user")
    return next((text for text in texts if text.strip()), "")


def _text_of(message: ChatMessage) -> str:
    content = message.content
    if content is None:
        return ""
    if isinstance(content, tuple):
        return "\n".join(str(part["text"]) for part in content if isinstance(part.get("text"), str))
    return opened(content)
