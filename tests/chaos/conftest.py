"""Two platforms: one on which something is killed, and one on which nothing is."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tessera.testkit import Stack
from tessera.testkit.platform import Platform


@pytest.fixture(scope="module")
def pair(stack: Stack) -> Iterator[tuple[Platform, Platform]]:
    """(unkilled, killed)."""
    platforms = (Platform(stack), Platform(stack))
    try:
        with ThreadPoolExecutor(2) as starting:
            list(starting.map(Platform.start, platforms))
        yield platforms
    finally:
        for platform in platforms:
            platform.stop()


@pytest.fixture
def unkilled(pair: tuple[Platform, Platform]) -> Platform:
    return pair[0]


@pytest.fixture
def killed(pair: tuple[Platform, Platform]) -> Platform:
    return pair[1]
