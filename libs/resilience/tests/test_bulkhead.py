import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.resilience import Bulkhead, BulkheadFullError

pytestmark = pytest.mark.unit


@given(limit=st.integers(1, 5), calls=st.integers(0, 20))
def test_never_more_than_the_limit_at_once_and_all_get_through(limit: int, calls: int) -> None:
    async def scenario() -> None:
        bulkhead, inside, most, done = Bulkhead(limit), 0, 0, 0

        async def call() -> None:
            nonlocal inside, most, done
            async with bulkhead:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1
                done += 1

        await asyncio.gather(*(call() for _ in range(calls)))
        assert (most, done) == (min(limit, calls), calls)
        assert (bulkhead.running, bulkhead.waiting) == (0, 0)

    asyncio.run(scenario())


async def test_a_full_queue_refuses_at_once() -> None:
    bulkhead, release = Bulkhead(1, waiting=1), asyncio.Event()

    async def call() -> None:
        async with bulkhead:
            await release.wait()

    calls = [asyncio.create_task(call()) for _ in range(2)]
    await asyncio.sleep(0)
    assert (bulkhead.running, bulkhead.waiting) == (1, 1)
    with pytest.raises(BulkheadFullError, match="1 calls run and 1 wait"):
        await call()
    release.set()
    await asyncio.gather(*calls)


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    bulkhead = Bulkhead(1)
    async with bulkhead:
        waiter = asyncio.create_task(bulkhead.__aenter__())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert bulkhead.waiting == 0
    async with bulkhead:
        assert bulkhead.running == 1


async def test_a_failing_block_frees_its_place() -> None:
    bulkhead = Bulkhead(1)
    with pytest.raises(KeyError):
        async with bulkhead:
            raise KeyError
    assert bulkhead.running == 0


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        Bulkhead(0)
