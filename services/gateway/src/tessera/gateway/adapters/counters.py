"""What callers have used, in Redis: windows by the `limits` library, open streams in sorted sets.

Every key expires by itself, so a Redis that evicts or is flushed forgets a minute of use and nothing else.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from typing import Final, TypeVar

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.storage.redis.bridge import RedisBridge
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tessera.gateway.domain.limits import Holder, Standing, Window
from tessera.gateway.ports import Seat
from tessera.resilience import Breaker, CircuitOpenError
from tessera.telemetry import get_logger

T = TypeVar("T")

_PREFIX: Final = "tessera:limits"
_MINUTE_SECONDS: Final = 60
_ENTER: Final = """
for place = 1, #KEYS do
    redis.call('ZREMRANGEBYSCORE', KEYS[place], '-inf', ARGV[1])
    if redis.call('ZCARD', KEYS[place]) >= tonumber(ARGV[3 + place]) then
        return place
    end
end
for place = 1, #KEYS do
    redis.call('ZADD', KEYS[place], ARGV[2], ARGV[3])
    redis.call('PEXPIREAT', KEYS[place], ARGV[2])
end
return 0
"""
"""Streams whose time is over go; where each key has room, this one is added to all."""
_LEAVE: Final = """
for place = 1, #KEYS do
    redis.call('ZREM', KEYS[place], ARGV[1])
end
"""
_COUNT: Final = f"""
local function look(KEYS, ARGV)
{RedisBridge.SCRIPT_SLIDING_WINDOW.decode()}
end
local function take(KEYS, ARGV)
{RedisBridge.SCRIPT_ACQUIRE_SLIDING_WINDOW.decode()}
end
local expiry, cost, room, found = ARGV[1], tonumber(ARGV[2]), true, {{}}
for place = 1, #KEYS / 2 do
    local window = look({{KEYS[2 * place - 1], KEYS[2 * place]}}, {{expiry}})
    local before, fading, now = tonumber(window[1]) or 0, math.max(window[2], 0), tonumber(window[3]) or 0
    found[place] = {{before, fading, now, math.max(window[4], 0)}}
    room = room and math.floor(before * fading / (expiry * 1000)) + now + cost <= tonumber(ARGV[2 + place])
end
for place = 1, room and #KEYS / 2 or 0 do
    take({{KEYS[2 * place - 1], KEYS[2 * place]}}, {{ARGV[2 + place], expiry, ARGV[2]}})
end
return found
"""
"""The library's own two scripts, for several windows in one round trip: each command costs more on its way than in Redis."""

_log = get_logger(__name__)


class RedisCounters:
    """Implements `ports.Counters`."""

    def __init__(self, redis: Redis, breaker: Breaker) -> None:
        self._redis = redis
        self._breaker = breaker
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=_PREFIX,
            connection_pool=redis.connection_pool,  # type: ignore[arg-type]
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._enter = redis.register_script(_ENTER)
        self._leave = redis.register_script(_LEAVE)
        self._count = redis.register_script(_COUNT)

    async def check(self) -> None:
        """Raises RedisError or OSError when Redis does not answer."""
        await self._redis.ping()

    async def standings(self, windows: Sequence[Window]) -> Sequence[Standing] | None:
        """One look at each, side by side."""
        return await self._asked(lambda: self._standings(windows))

    async def count(self, windows: Sequence[Window], cost: int) -> Sequence[Standing] | None:
        """One atomic step for all."""
        keys = [key for each in windows for key in _window_keys(each)]
        arguments = [_MINUTE_SECONDS, cost, *(each.limit for each in windows)]
        found: Sequence[Sequence[int]] | None = await self._asked(lambda: self._count(keys=keys, args=arguments))
        return found if found is None else [_standing(window, *counted) for window, counted in zip(windows, found, strict=True)]

    async def take(self, windows: Sequence[Window], cost: int) -> Sequence[bool] | None:
        """One atomic step for each, side by side."""
        return await self._asked(lambda: _all(self._limiter.hit(_item(each), *_name(each.holder), cost=cost) for each in windows))

    async def enter(self, seats: Sequence[Seat], stream_id: str, longest: timedelta) -> Seat | None:
        """One atomic step for all."""
        now = time.time()
        moments = [int(now * 1_000), int((now + longest.total_seconds()) * 1_000)]
        keys = [_stream_key(seat.holder) for seat in seats]
        arguments: list[int | str] = [*moments, stream_id, *(seat.limit for seat in seats)]
        full: int | None = await self._asked(lambda: self._enter(keys=keys, args=arguments))
        return seats[full - 1] if full else None

    async def leave(self, seats: Sequence[Seat], stream_id: str) -> None:
        """One step for all."""
        await self._asked(lambda: self._leave(keys=[_stream_key(seat.holder) for seat in seats], args=[stream_id]))

    async def _standings(self, windows: Sequence[Window]) -> Sequence[Standing]:
        found = await _all(self._limiter.get_window_stats(_item(each), *_name(each.holder)) for each in windows)
        now = time.time()
        return [
            Standing(window, stats.remaining, timedelta(seconds=max(0.0, stats.reset_time - now)))
            for window, stats in zip(windows, found, strict=True)
        ]

    async def _asked(self, work: Callable[[], Awaitable[T]]) -> T | None:
        try:
            return await self._breaker.call(work)
        except (RedisError, OSError) as error:
            _log.warning("use_not_counted", error=str(error))
        except CircuitOpenError:
            pass  # said when it opened
        return None


async def _all(steps: Iterable[Awaitable[T]]) -> Sequence[T]:
    return await asyncio.gather(*steps)


def _item(window: Window) -> RateLimitItem:
    kind = RateLimitItemPerDay if window.resource == "spend" else RateLimitItemPerMinute
    return kind(window.limit, namespace=window.resource)


def _window_keys(window: Window) -> tuple[str, str]:
    """Where the library has the minute before and this one."""
    now = f"{_PREFIX}:{{{_item(window).key_for(*_name(window.holder))}}}"
    return f"{now}/-1", now


def _standing(window: Window, before: int, fading_ms: int, now: int, ending_ms: int) -> Standing:
    """As the library reckons it: the minute before counts as far as it still lies within 60 s, and fades one by one."""
    counted = math.floor(before * fading_ms / 1_000 / _MINUTE_SECONDS + now)
    resets = [fading_ms % (_MINUTE_SECONDS * 1_000 / before)] if before else []
    resets += [ending_ms % (_MINUTE_SECONDS * 1_000)] if now else []
    return Standing(window, max(0, window.limit - counted), timedelta(milliseconds=min(resets, default=0)))


def _name(holder: Holder) -> tuple[str, str]:
    """Hashed: a user's name may be anything, and nobody who reads Redis needs it."""
    return holder.scope, hashlib.blake2b(holder.name.encode(), digest_size=16).hexdigest()


def _stream_key(holder: Holder) -> str:
    return ":".join((_PREFIX, "streams", *_name(holder)))
