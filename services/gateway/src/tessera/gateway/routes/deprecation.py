"""Operations that will go away, and what their answers say of it: Deprecation (RFC 9745), Sunset (RFC 8594) and their successor.

A path begins with the version that it belongs to. An operation changes in ways that break a client only under the next one, and then stands
in this table until its sunset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from typing import Final
from urllib.parse import quote

from starlette.types import Scope


@dataclass(frozen=True)
class Deprecated:
    """One operation on its way out. Raises ValueError for a sunset that is not after its deprecation."""

    since: datetime
    sunset: datetime
    """In UTC. From then on it may be gone."""
    successor: str | None = None
    """The path to use instead, with the same parameters in braces."""

    def __post_init__(self) -> None:
        if self.sunset <= self.since:
            raise ValueError("sunset must be after since: clients need time to move")


DEPRECATED: Final[Mapping[tuple[str, str], Deprecated]] = {}
"""By method and path, as in the OpenAPI document."""


def headers(scope: Scope) -> dict[str, str]:
    """What the answer to a request says of its operation, once a route was found for it."""
    found = DEPRECATED.get((scope["method"], getattr(scope.get("route"), "path_format", "")))
    if found is None:
        return {}
    told = {"deprecation": f"@{int(found.since.timestamp())}", "sunset": format_datetime(found.sunset, usegmt=True)}
    if found.successor is not None:
        parameters = {name: quote(str(value), safe="") for name, value in scope.get("path_params", {}).items()}
        told["link"] = f'<{found.successor.format_map(parameters)}>; rel="successor-version"'
    return told
