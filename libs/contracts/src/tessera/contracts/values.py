"""Small immutable values of which several are made for every event."""

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value_class(cls: type[T]) -> type[T]:
    """A dataclass with slots whose fields are never set again.

    The type checker alone sees to that. `dataclass(frozen=True)` sees to it while the program runs and sets every field through
    `object.__setattr__`, so that making one takes about twice as long.
    Values are equal by their fields, and hashed by them.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
