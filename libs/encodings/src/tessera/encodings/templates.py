"""How messages become prompt tokens.

| template | a prompt (text) | messages |
|---|---|---|
| openai-chat | its tokens | 3 per message, the tokens of role, content and name, 1 more per name, 3 that prime the answer |
| plain | its tokens | the tokens of their contents joined by newlines (no roles, no names): what an engine reading plain text sees |
| text | its tokens | refused: a completion model takes text |

openai-chat is the rule of OpenAI's cookbook ("How to count tokens with tiktoken") for its chat models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.encodings.encoding import Encoding
from tessera.encodings.errors import PromptShapeError, UnknownTemplateError

TEMPLATE_NAMES = ("openai-chat", "plain", "text")

_TOKENS_PER_MESSAGE = 3
_TOKENS_PER_NAME = 1
_PRIMING_TOKENS = 3


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message of a chat as far as counting needs it."""

    role: str
    content: str
    name: str | None = None


def count_prompt(prompt: str | Sequence[PromptMessage], encoding: Encoding, template: str) -> int:
    """The number of prompt tokens under a template (see the module's table).

    Raises UnknownTemplateError, PromptShapeError for messages under "text", and as Encoding.encode does.
    """
    if template not in TEMPLATE_NAMES:
        raise UnknownTemplateError(f"unknown template {template!r}; known: {', '.join(TEMPLATE_NAMES)}")
    if isinstance(prompt, str):
        return encoding.count(prompt)
    if template == "text":
        raise PromptShapeError("this model completes text; it takes a prompt, not messages")
    if template == "plain":
        return encoding.count(plain_prompt(prompt))
    return sum(_chat_message(message, encoding) for message in prompt) + _PRIMING_TOKENS


def plain_prompt(messages: Sequence[PromptMessage]) -> str:
    """The text that the template "plain" counts."""
    return "\n".join(message.content for message in messages)


def _chat_message(message: PromptMessage, encoding: Encoding) -> int:
    tokens = _TOKENS_PER_MESSAGE + encoding.count(message.role) + encoding.count(message.content)
    if message.name is not None:
        tokens += encoding.count(message.name) + _TOKENS_PER_NAME
    return tokens
