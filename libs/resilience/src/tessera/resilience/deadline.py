"""A limit on how long a block may take."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from tessera.resilience.errors import TimedOutError


@asynccontextmanager
async def deadline(limit: float | timedelta | datetime | None) -> AsyncIterator[None]:
    """Cancels the block at the limit and raises TimedOutError.

    `limit` is seconds, a timedelta, a moment with time zone (ValueError without), or None for no limit. One already passed cancels at the
    first await. A TimeoutError of the block's own goes through unchanged.
    """
    seconds = _seconds(limit)
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired() or isinstance(error, TimedOutError):
            raise
        raise TimedOutError(f"not done within {max(seconds or 0.0, 0.0):.3g} s") from error


def _seconds(limit: float | timedelta | datetime | None) -> float | None:
    if isinstance(limit, datetime):
        if limit.tzinfo is None:
            raise ValueError("a deadline needs a time zone")
        return (limit - datetime.now(UTC)).total_seconds()
    return limit.total_seconds() if isinstance(limit, timedelta) else limit
