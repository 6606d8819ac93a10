"""Content that may one day be sealed: the shape is there from version 1, the sealing comes with the keyring.

Version 1 writes plain content only. Whoever meets a sealed value without a key says so instead of guessing.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

from pydantic import Field

from tessera.contracts.base import Record
from tessera.contracts.errors import InvalidError

T = TypeVar("T")


class Sealed(Record):
    """Content encrypted under a subject's key."""

    key_id: Annotated[str, Field(min_length=1, max_length=128)]
    nonce: Annotated[str, Field(description="Base64.", max_length=64)]
    ciphertext: Annotated[str, Field(description="Base64.")]


Sealable: TypeAlias = T | Sealed


def opened(value: T | Sealed) -> T:
    """The plain content. Raises InvalidError `sealed_content` for sealed content, which version 1 cannot open."""
    if isinstance(value, Sealed):
        raise InvalidError("sealed_content", "This content is sealed and no key for it is known here.")
    return value
