"""What all questions over the log have in common."""

from typing import TypeVar

from tessera.contracts.base import EventData
from tessera.contracts.errors import FatalError

D = TypeVar("D", bound=EventData)


def expect(answer: type[D], data: EventData) -> D:
    """The answer as its class. Raises FatalError where a service answered with something else: contracts are broken."""
    if not isinstance(data, answer):
        raise FatalError(f"expected {answer.event_type}, got {data.event_type}")
    return data
