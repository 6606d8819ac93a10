"""What the handlers need from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem
from tessera.tokenizer.domain.composition import Composed


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a text came from: the memory it is the text of, or the request of a subject ("" where none is named)."""

    kind: Literal["memory", "request"]
    source_id: str
    subject_id: str | None


class Vocabulary(Protocol):
    """A tenant's compositions. Raises RetryableError or CircuitOpenError while they cannot be reached."""

    async def store(self, tenant_id: str, composed: Composed, provenance: Provenance) -> None:
        """Keeps a text's compositions and where they came from; the same again changes nothing.

        Raises InvalidError `composition_conflict` where an id is stored with another content.
        """

    async def text(self, tenant_id: str, composition_id: bytes) -> bytes:
        """The exact bytes of a stored composition, or of a single token, which every tenant has.

        Raises InvalidError `composition_not_found` or `composition_corrupt`.
        """


class Emits(Protocol):
    """Emits events caused by the one being handled; a repeat emits the same ids."""

    async def publish(self, data: EventData, *, step: str, index: int = 0, key: bytes | None = None) -> str:
        """Sends to the topic that the catalogue names, and returns the event's id."""

    async def reply(self, data: EventData, *, step: str = "reply", index: int = 0) -> str:
        """Answers whoever asked."""

    async def fail(self, problem: Problem) -> str:
        """Answers that there is no answer."""
