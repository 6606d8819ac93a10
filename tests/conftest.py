"""One platform for contract, integration and end-to-end tests: six real services. Chaos tests make their own, because they break them."""

from collections.abc import Iterator

import pytest

from tessera.testkit import Stack
from tessera.testkit.platform import Platform
from tessera.testkit.plugin import until_last_use


@pytest.fixture(scope="session")
def platform(stack: Stack) -> Iterator[Platform]:
    started = Platform(stack)
    try:
        started.start()
        until_last_use("platform", started.stop)
        yield started
    finally:
        started.stop()
