"""Keys come by TLS from whom the operator trusts, and from nobody else."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tessera.gateway.adapters.issuer import Issuer, IssuerUnavailableError, Jwk, issuer_client
from tessera.local.certificates import Authority
from tessera.storage import TlsFiles
from tessera.testkit.issuer import LocalIssuer
from tessera.testkit.tls_proxy import TlsProxy

pytestmark = pytest.mark.integration

PATIENCE = timedelta(seconds=10)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.create()
    return made


@pytest.fixture(scope="module")
def issuer(authority: Authority) -> Iterator[LocalIssuer]:
    """Reached by https only."""
    with LocalIssuer().running() as running:
        proxy = TlsProxy(running.port, authority.issue("issuer"))
        proxy.start()
        running.url = f"https://localhost:{proxy.port}"
        yield running
        proxy.stop()


async def keys(issuer: LocalIssuer, ca_file: Path | None) -> list[Jwk]:
    async with issuer_client(TlsFiles(ca_file=ca_file).context(), PATIENCE) as client:
        return list(await Issuer(client, issuer.url, None, PATIENCE).keys())


async def test_an_authority_of_ones_own(issuer: LocalIssuer, authority: Authority) -> None:
    assert await keys(issuer, authority.ca_file) == [key.jwk() for key in issuer.keys]


async def test_an_authority_that_nobody_named(issuer: LocalIssuer) -> None:
    with pytest.raises(IssuerUnavailableError, match="ConnectError"):
        await keys(issuer, None)
