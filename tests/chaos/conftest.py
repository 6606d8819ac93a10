"""Two platforms: one on which something is killed, on servers that no other test depends on, and the run's own, on which nothing is."""

import secrets
from collections.abc import Iterator

import pytest
from chaos.world import World

from tessera.testkit import Stack
from tessera.testkit.platform import Platform

_running: list[World] = []


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
    _running.append(made)
    yield made
    made.stop()


@pytest.fixture
def unkilled(platform: Platform) -> Platform:
    return platform


@pytest.fixture
def killed(world: World) -> Platform:
    return world.platform


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the world after the last test that uses it, as the platform is stopped."""
    if _uses_world(item) and (nextitem is None or not _uses_world(nextitem)):
        while _running:
            _running.pop().stop()


def _uses_world(item: pytest.Item) -> bool:
    return "world" in getattr(item, "fixturenames", ())
