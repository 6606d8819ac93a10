"""Who may go on, and what it counts for: requests, tokens, streams and spending of an address, a key, a user and a tenant."""

import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal

from tessera.gateway.domain import limits
from tessera.gateway.domain.limits import UNLIMITED, Allowance, Holder, Resource, Scope, Standing
from tessera.gateway.ports import Counters, Seat


@dataclass
class Use:
    """What one request has been counted for, and how its callers stood then."""

    holders: tuple[Holder, ...] = ()
    standings: list[Standing] = field(default_factory=list)
    tokens: int = 0
    own: Allowance = UNLIMITED
    """What its key may use, where that is not what every key may."""

    def headers(self) -> dict[str, str]:
        """What its answer tells the client."""
        return limits.headers(self.standings)


class Gate:
    """Counts before anything is begun. Without counters, or while they cannot be reached, everybody is let through uncounted."""

    def __init__(self, counters: Counters | None = None, allowances: Mapping[Scope, Allowance] | None = None) -> None:
        self._counters = counters
        self._allowances: Mapping[Scope, Allowance] = allowances or {}

    def allow(self, allowances: Mapping[Scope, Allowance]) -> None:
        """Has other limits from now on; what was counted stays counted."""
        self._allowances = allowances

    async def admit(self, use: Use, *holders: Holder) -> None:
        """One request of each. Raises ApiError 429; what is refused is not counted."""
        use.holders += holders
        await self._take(use, holders, "requests", 1)

    async def reserve(self, use: Use, tokens: int) -> None:
        """What a generation is expected to use, of each holder. Raises ApiError 429; what is refused is not counted."""
        await self._take(use, use.holders, "tokens", tokens)
        use.tokens = tokens

    async def afford(self, use: Use) -> None:
        """Raises ApiError 429 where a holder has spent all that it may."""
        windows = limits.windows(self._allowed(use), use.holders, "spend")
        if self._counters is None or not windows:
            return
        short = limits.tightest(standing for standing in await self._counters.standings(windows) or () if standing.remaining <= 0)
        if short is not None:
            raise limits.spent(short)

    async def settle(self, use: Use, tokens: int, cost: Decimal | None = None) -> None:
        """Counts what a generation used beyond its reservation, and what it cost.

        As far as there is room: what is over a full window is forgiven.
        """
        beyond = tokens - use.tokens
        if beyond > 0:
            use.tokens = tokens
            await self._add(use, "tokens", beyond)
        if cost:
            await self._add(use, "spend", math.ceil(cost * limits.MILLIONTHS))

    async def _add(self, use: Use, resource: Resource, amount: int) -> None:
        windows = limits.windows(self._allowed(use), use.holders, resource)
        if self._counters is None or not windows:
            return
        for standing in await self._counters.standings(windows) or ():
            if cost := min(amount, standing.remaining):
                await self._counters.take([standing.window], cost)

    @asynccontextmanager
    async def streaming(self, use: Use, stream_id: str, longest: timedelta) -> AsyncIterator[None]:
        """A seat among the streams of each holder. Raises ApiError 429 where one has none left."""
        seats = self._seats(use)
        counters = self._counters
        if counters is None or not seats:
            yield
            return
        if (full := await counters.enter(seats, stream_id, longest)) is not None:
            raise limits.too_many_streams(full.holder, full.limit)
        try:
            yield
        finally:
            await counters.leave(seats, stream_id)

    async def _take(self, use: Use, holders: Iterable[Holder], resource: Resource, cost: int) -> None:
        windows = limits.windows(self._allowed(use), holders, resource)
        if self._counters is None or not windows:
            return
        standings = await self._counters.count(windows, cost)
        if standings is None:
            return
        short = limits.tightest(standing for standing in standings if standing.remaining < cost)
        use.standings += standings if short else [_less(standing, cost) for standing in standings]
        if short is not None:
            raise limits.exceeded(short, cost)

    def _allowed(self, use: Use) -> Mapping[Scope, Allowance]:
        return {**self._allowances, "key": self._allowances.get("key", UNLIMITED).but(use.own)}

    def _seats(self, use: Use) -> Sequence[Seat]:
        allowed = self._allowed(use)
        found = ((holder, allowed.get(holder.scope, UNLIMITED).concurrent_streams) for holder in use.holders)
        return [Seat(holder, limit) for holder, limit in found if limit is not None]


def _less(standing: Standing, cost: int) -> Standing:
    return Standing(standing.window, max(0, standing.remaining - cost), standing.reset_after)
