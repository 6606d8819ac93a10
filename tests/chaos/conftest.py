"""Two platforms: one on which something is killed, on servers that no other test depends on, and the run's own, on which nothing is."""

import secrets
from collections.abc import Iterator

import pytest
from chaos.world import World

from tessera.testkit import Stack
from tessera.testkit.platform import Platform
from tessera.testkit.plugin import until_last_use


@pytest.fixture(scope="module")
def killable() -> Iterator[Stack]:
    """The usual stack, but of its own: its servers may be killed."""
    started = Stack()
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """What may be killed: one for all files that mark themselves as of the platform's group."""
    made = World(secrets.randbelow(2**31))
    made.start()
    until_last_use("world", made.stop)
    yield made
    made.stop()


@pytest.fixture
def unkilled(platform: Platform) -> Platform:
    return platform


@pytest.fixture
def killed(world: World) -> Platform:
    return world.platform
