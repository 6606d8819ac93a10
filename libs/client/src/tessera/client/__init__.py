"""The Python SDK and the `tessera` command. For chats use any OpenAI client: only its base URL changes."""

from tessera.client.errors import AnswerError, ClientError, UnreachableError
from tessera.client.sdk import Tessera, read_your_writes

__all__ = ["AnswerError", "ClientError", "Tessera", "UnreachableError", "read_your_writes"]
