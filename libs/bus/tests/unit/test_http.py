"""A listener that speaks TLS, met by real clients."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import uvloop
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tessera.bus.http import HttpServer
from tessera.local.certificates import Authority, Certificate
from tessera.storage import ListenerTls
from tessera.testkit import eventually

Scenario = Callable[[str], Awaitable[None]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.create()
    return made


def told(certificate: Certificate, **more: Path) -> ListenerTls:
    return ListenerTls(certificate_file=certificate.certificate_file, key_file=certificate.key_file, **more)


async def scheme(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.url.scheme)


@asynccontextmanager
async def served(tls: ListenerTls) -> AsyncIterator[str]:
    app = Starlette(routes=[Route("/", scheme)])
    server = HttpServer(app, "127.0.0.1", 0, drain=timedelta(seconds=1), tls=tls.listening_context())
    running = asyncio.create_task(server.run_until_told())
    await eventually(lambda: server.started)
    yield f"https://127.0.0.1:{server.address[1]}/"
    server.leave()
    await running


def meet(tls: ListenerTls, scenario: Scenario) -> None:
    """On the loop that services run on."""

    async def run() -> None:
        async with served(tls) as url:
            await scenario(url)

    uvloop.run(run())


def trusting(authority: Authority, shown: Certificate | None = None) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    if shown is not None:
        context.load_cert_chain(shown.certificate_file, shown.key_file)
    return httpx.AsyncClient(verify=context)


def test_who_trusts_the_authority_is_answered_and_nothing_but_tls_is_spoken(authority: Authority) -> None:
    async def scenario(url: str) -> None:
        async with trusting(authority) as client:
            assert (await client.get(url)).text == "https"
        async with httpx.AsyncClient(verify=ssl.create_default_context()) as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get(url)
            with pytest.raises(httpx.RemoteProtocolError):
                await stranger.get(url.replace("https", "http"))

    meet(told(authority.issue("plain")), scenario)


def test_with_an_authority_for_clients_only_its_own_are_let_in(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path)
    stranger.create()

    async def scenario(url: str) -> None:
        async with trusting(authority, authority.issue("client")) as known:
            assert (await known.get(url)).status_code == 200
        for shown in (None, stranger.issue("client")):
            async with trusting(authority, shown) as refused:
                with pytest.raises(httpx.TransportError):
                    await refused.get(url)

    meet(told(authority.issue("mutual"), ca_file=authority.ca_file), scenario)


def test_a_renewed_certificate_is_shown_to_the_next_client_and_a_broken_one_never(authority: Authority) -> None:
    async def shown(url: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port, ssl=ssl._create_unverified_context())
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        await writer.wait_closed()
        del reader
        return bytes(certificate)

    certificate = authority.issue("renewed")

    async def scenario(url: str) -> None:
        first = await shown(url)
        async with trusting(authority) as open_before:
            await open_before.get(url)
            authority.issue("renewed")
            second = await shown(url)
            certificate.key_file.write_text("half of a key")
            assert await shown(url) == await shown(url) == second != first
            assert (await open_before.get(url)).status_code == 200
        authority.issue("renewed")
        assert await shown(url) not in (first, second)

    meet(told(certificate), scenario)


def test_what_cannot_be_shown_is_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    for wrong, said in (
        ({"certificate_file": tmp_path / "none.pem"}, r"certificate_file .*none\.pem cannot be read"),
        ({"certificate_file": one.certificate_file, "key_file": other.key_file}, "does not belong to the certificate"),
        ({"certificate_file": one.certificate_file}, "cannot be used"),
        ({"key_file": one.key_file}, "belong to a certificate_file, which is missing"),
        ({"ca_file": authority.ca_file}, "needs a certificate_file of the server's own"),
        ({"certificate_file": one.certificate_file, "key_file": one.key_file, "ca_file": one.key_file}, "holds no certificate in PEM form"),
    ):
        with pytest.raises(ValidationError, match=said):
            ListenerTls.model_validate(wrong)
    assert ListenerTls().listening_context() is None
