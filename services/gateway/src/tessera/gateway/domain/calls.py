"""Calls as they are counted."""

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, order=True)
class Counted:
    """What calls have in common that are counted together."""

    tenant_id: str
    day: date
    credential_id: str
    operation: str
    """Method and path, as the OpenAPI document has them."""


@dataclass(frozen=True)
class CallRow:
    """Sums of one group of calls; the fields that were not grouped by are None."""

    day: date | None
    credential_id: str | None
    operation: str | None
    requests: int
    errors: int
