"""One platform for contract, integration and end-to-end tests: six real services. Chaos tests make their own, because they break them."""

from collections.abc import Iterator

import pytest

from tessera.testkit import Stack
from tessera.testkit.platform import Platform
from tessera.testkit.plugin import shares_platform

_running: list[Platform] = []


@pytest.fixture(scope="session")
def platform(stack: Stack) -> Iterator[Platform]:
    started = Platform(stack)
    try:
        started.start()
        _running.append(started)
        yield started
    finally:
        started.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the platform after the last test that uses it: six idle services would slow all tests that follow."""
    if shares_platform(item) and (nextitem is None or not shares_platform(nextitem)):
        while _running:
            _running.pop().stop()
