"""What callers may use within a minute, how much of it is left, and how an answer tells them: OpenAI's headers and its 429.

The headers are those of the live API: https://platform.openai.com/docs/guides/rate-limits, "Rate limits in headers".
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, Literal

from tessera.gateway.domain.errors import ApiError

Scope = Literal["ip", "key", "user", "tenant"]
Resource = Literal["requests", "tokens", "spend"]

_BYTES_OF_A_TOKEN: Final = 4
"""Of English text under OpenAI's encodings, about: https://help.openai.com/en/articles/4936856."""


@dataclass(frozen=True)
class Allowance:
    """What one caller may use. None is without a limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None
    spend_per_day: int | None = None
    """In millionths of the operator's currency."""

    def of(self, resource: Resource) -> int | None:
        """The most of `resource` within its window."""
        limits = {"requests": self.requests_per_minute, "tokens": self.tokens_per_minute, "spend": self.spend_per_day}
        return limits[resource]

    def but(self, other: "Allowance") -> "Allowance":
        """This one, with what the other says in its place."""
        return replace(self, **other.said())

    def said(self) -> dict[str, int]:
        """What is limited, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


UNLIMITED: Final = Allowance()
MILLIONTHS: Final = 1_000_000
"""Of the currency: what spending is counted in."""


@dataclass(frozen=True)
class Holder:
    """Whose use is counted."""

    scope: Scope
    name: str


def user_of(tenant_id: str, name: str) -> Holder:
    """A user of a tenant: of the same name in another, it is another."""
    return Holder("user", f"{tenant_id}\x00{name}")


@dataclass(frozen=True)
class Window:
    """One count over the last minute; of what is spent, over the last day."""

    holder: Holder
    resource: Resource
    limit: int


@dataclass(frozen=True)
class Standing:
    """What is left of a window."""

    window: Window
    remaining: int
    reset_after: timedelta
    """Until more is left than now."""


def windows(allowances: Mapping[Scope, Allowance], holders: Iterable[Holder], resource: Resource) -> list[Window]:
    """The counts that a use of `resource` by `holders` belongs to."""
    found = []
    for holder in holders:
        limit = allowances.get(holder.scope, UNLIMITED).of(resource)
        if limit is not None:
            found.append(Window(holder, resource, limit))
    return found


def tightest(standings: Iterable[Standing]) -> Standing | None:
    """Where the least is left; of several, where the longest wait is."""
    return min(standings, key=lambda standing: (standing.remaining, -standing.reset_after), default=None)


def headers(standings: Iterable[Standing]) -> dict[str, str]:
    """For each resource the tightest window, as `x-ratelimit-{limit,remaining,reset}-…`."""
    known = list(standings)
    told = {}
    for resource in ("requests", "tokens"):
        standing = tightest(each for each in known if each.window.resource == resource)
        if standing is not None:
            told[f"x-ratelimit-limit-{resource}"] = str(standing.window.limit)
            told[f"x-ratelimit-remaining-{resource}"] = str(standing.remaining)
            told[f"x-ratelimit-reset-{resource}"] = duration(standing.reset_after)
    return told


def duration(value: timedelta) -> str:
    """As the live API writes it: `0s`, `120ms`, `1.5s`, `1m2s`."""
    milliseconds = max(0, math.ceil(value / timedelta(milliseconds=1)))
    if 0 < milliseconds < 1_000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1_000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds


def exceeded(standing: Standing, cost: int) -> ApiError:
    """429: the window of `standing` has no room for `cost`."""
    window = standing.window
    if cost > window.limit:
        return ApiError(
            429, "rate_limit_exceeded", f"Request too large for the limit {_named(window)}: requested {cost}.", cause=window.resource
        )
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"Rate limit reached: {_named(window)}, {standing.remaining} left, requested {cost}. "
        f"Please try again in {duration(standing.reset_after)}.",
        cause=window.resource,
        retry_after=standing.reset_after,
    )


def spent(standing: Standing) -> ApiError:
    """429: nothing may be spent any more. No repeat can succeed soon, so none is suggested."""
    window = standing.window
    message = f"You exceeded your current quota: {window.limit / MILLIONTHS:g} per day of this {_WORDS[window.holder.scope]} are spent."
    return ApiError(429, "insufficient_quota", message, cause="insufficient_quota")


def too_many_streams(holder: Holder, limit: int) -> ApiError:
    """429: as many streams as allowed are open."""
    message = f"{limit} streams of this {_WORDS[holder.scope]} are open, which is its limit. Try again once one has ended."
    return ApiError(429, "rate_limit_exceeded", message, cause="streams", retry_after=timedelta(seconds=1))


_WORDS: Final[Mapping[Scope, str]] = {"ip": "address", "key": "API key", "user": "user", "tenant": "tenant"}


def _named(window: Window) -> str:
    return f"{window.limit} {window.resource} per minute of this {_WORDS[window.holder.scope]}"


def estimated_tokens(text_bytes: int, most_generated: int | None) -> int:
    """What a request is charged before anybody has counted: its text, and all that it allows the model to say."""
    return max(1, math.ceil(text_bytes / _BYTES_OF_A_TOKEN)) + (most_generated or 0)
