"""One platform for contract, integration and end-to-end tests: six real services. Chaos tests make their own, because they break them."""

from collections.abc import Iterator

import pytest
from upstream import Upstream

from tessera.testkit import Stack
from tessera.testkit.issuer import LocalIssuer
from tessera.testkit.platform import Platform
from tessera.testkit.plugin import until_last_use


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """The provider whose models the shared platform offers beside its own."""
    with Upstream().running() as running:
        yield running


@pytest.fixture(scope="session")
def issuer() -> Iterator[LocalIssuer]:
    """The OpenID provider whose access tokens the shared platform takes beside its own keys."""
    with LocalIssuer().running() as running:
        yield running


@pytest.fixture(scope="session")
def platform(stack: Stack, upstream: Upstream, issuer: LocalIssuer) -> Iterator[Platform]:
    started = Platform(stack, settings={**upstream.settings(), **issuer.settings()})
    try:
        started.start()
        until_last_use("platform", started.stop)
        yield started
    finally:
        started.stop()
