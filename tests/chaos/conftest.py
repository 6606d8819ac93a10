"""Two platforms: one on which something is killed, and one on which nothing is; on servers that no other test depends on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tessera.testkit import Stack
from tessera.testkit.breakable import BreakableStack
from tessera.testkit.platform import Platform


@pytest.fixture(scope="module")
def killable() -> Iterator[Stack]:
    """The usual stack, but of its own: its servers may be killed."""
    started = Stack()
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def breakable() -> Iterator[BreakableStack]:
    """A stack that may be killed: after a kill, Kafka first reads again whatever all tests before have written."""
    started = BreakableStack()
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def pair(breakable: BreakableStack) -> Iterator[tuple[Platform, Platform]]:
    """(unkilled, killed)."""
    platforms = (Platform(breakable), Platform(breakable))
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
