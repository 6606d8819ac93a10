"""The tree of errors that the bus acts on.

    TesseraError
    ├── RetryableError   may succeed later: waits with backoff, spends an attempt
    ├── InvalidError     can never succeed: dead letter at once, the producer is told why
    └── FatalError       this process must not go on: the service stops

Everything that a domain or a handler raises on purpose is one of the three.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TesseraError(Exception):
    """Base of every error with a meaning in Tessera. `code` is machine-readable and stable."""

    code: str = "internal_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class RetryableError(TesseraError):
    """The same call may succeed later: a dependency is down, slow or busy."""

    code = "temporarily_unavailable"


class InvalidError(TesseraError):
    """The input can never be handled. `field` is the dotted path of what is wrong, where there is one."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message, code=code)
        self.field = field


class FatalError(TesseraError):
    """Going on would do harm (a broken invariant, a lost log): the service stops and says why."""

    code = "fatal_error"


class Problem(BaseModel):
    """An error as it travels in an event and becomes the REST error object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*$")]
    message: Annotated[str, Field(max_length=2_000)]
    param: Annotated[str | None, Field(max_length=256)] = None
    status: Annotated[int | None, Field(ge=400, le=599, description="The HTTP status this problem deserves.")] = None

    @classmethod
    def of(cls, error: TesseraError, *, status: int | None = None) -> Problem:
        """The problem that tells a caller about `error`."""
        return cls(code=error.code, message=error.message[:2_000], param=getattr(error, "field", None), status=status)
