import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from tessera.resilience import TimedOutError, deadline

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("limit", [0.01, timedelta(milliseconds=10), 0, -5])
async def test_cancels_the_block_and_says_so(limit: float | timedelta) -> None:
    with pytest.raises(TimedOutError):
        async with deadline(limit):
            await asyncio.sleep(30)


async def test_a_moment_is_a_limit() -> None:
    with pytest.raises(TimedOutError, match="not done within"):
        async with deadline(datetime.now(UTC) + timedelta(milliseconds=10)):
            await asyncio.sleep(30)


async def test_a_moment_without_a_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        async with deadline(datetime(2030, 1, 1)):  # noqa: DTZ001
            pass


@pytest.mark.parametrize("limit", [30, None, datetime.max.replace(tzinfo=UTC)])
async def test_a_block_that_is_done_in_time_passes(limit: float | datetime | None) -> None:
    async with deadline(limit):
        await asyncio.sleep(0)


async def test_a_time_out_of_the_blocks_own_is_not_renamed() -> None:
    with pytest.raises(TimeoutError) as raised:
        async with deadline(30):
            raise TimeoutError("own")
    assert not isinstance(raised.value, TimedOutError)


async def test_of_two_the_shorter_one_ends_it() -> None:
    with pytest.raises(TimedOutError):
        async with deadline(30), deadline(0.01):
            await asyncio.sleep(30)
    with pytest.raises(TimedOutError):
        async with deadline(0.01), deadline(30):
            await asyncio.sleep(30)


async def test_cancellation_from_outside_stays_cancellation() -> None:
    async def block() -> None:
        async with deadline(30):
            await asyncio.sleep(30)

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
