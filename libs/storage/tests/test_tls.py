"""TLS to Postgres and Redis through a proxy that ends it: the packaged servers are built without."""

import asyncio
import shutil
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from pydantic import SecretStr, ValidationError
from redis.exceptions import RedisError
from sqlalchemy import text

from tessera.local.certificates import Authority
from tessera.storage import Database, PostgresSettings, PostgresTls, RedisSettings, StorageUnavailableError, TlsFiles, redis_client
from tessera.storage.bootstrap import bootstrap
from tessera.testkit.stack import Stack
from tessera.testkit.tls_proxy import TlsProxy

pytestmark = pytest.mark.integration

NewProxy = Callable[..., TlsProxy]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.create()
    return made


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("stranger"))
    made.create()
    return made


@pytest.fixture
def new_proxy() -> Iterator[NewProxy]:
    made: list[TlsProxy] = []

    def start(*arguments: object, **options: object) -> TlsProxy:
        made.append(TlsProxy(*arguments, **options))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield start
    for proxy in made:
        proxy.stop()


def behind(proxy: TlsProxy, settings: PostgresSettings, **tls: object) -> PostgresSettings:
    return settings.model_copy(update={"port": proxy.port, "tls": PostgresTls.model_validate(tls)})


async def answer(settings: PostgresSettings) -> object:
    database = Database("sample", settings)
    try:
        async with database.transaction() as connection:
            return (await connection.execute(text("SELECT 1"))).scalar_one()
    finally:
        await database.close()


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_postgres_answers_over_tls(postgres: PostgresSettings, authority: Authority, new_proxy: NewProxy, mode: str) -> None:
    proxy = new_proxy(postgres.port, authority.issue("server"), postgres=True)
    assert await answer(behind(proxy, postgres, mode=mode, ca_file=authority.ca_file)) == 1
    assert proxy.connections == 1


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_a_postgres_of_a_strange_authority_is_not_believed(
    postgres: PostgresSettings, authority: Authority, stranger: Authority, new_proxy: NewProxy, mode: str
) -> None:
    """Also in mode require, when an authority is named: as libpq does."""
    proxy = new_proxy(postgres.port, stranger.issue("server"), postgres=True)
    with pytest.raises(StorageUnavailableError):
        await answer(behind(proxy, postgres, mode=mode, ca_file=authority.ca_file))
    assert proxy.connections == 0


@pytest.mark.parametrize(("mode", "believed"), [("verify-ca", True), ("verify-full", False)])
async def test_only_verify_full_looks_at_the_host_name(
    postgres: PostgresSettings, authority: Authority, new_proxy: NewProxy, mode: str, believed: bool
) -> None:
    elsewhere = authority.issue("elsewhere", server_names="subjectAltName=DNS:elsewhere.example")
    proxy = new_proxy(postgres.port, elsewhere, postgres=True)
    settings = behind(proxy, postgres, mode=mode, ca_file=authority.ca_file)
    if believed:
        assert await answer(settings) == 1
    else:
        with pytest.raises(StorageUnavailableError):
            await answer(settings)


async def test_a_postgres_without_tls_is_refused(postgres: PostgresSettings) -> None:
    settings = postgres.model_copy(update={"tls": PostgresTls(mode="require")})
    with pytest.raises(StorageUnavailableError, match="rejected SSL upgrade"):
        await answer(settings)


async def test_postgres_may_ask_for_a_certificate(postgres: PostgresSettings, authority: Authority, new_proxy: NewProxy) -> None:
    proxy = new_proxy(postgres.port, authority.issue("server"), postgres=True, client_authority=authority.ca_file)
    mine = authority.issue("client", password="locked")
    files = {"certificate_file": mine.certificate_file, "key_file": mine.key_file, "key_password": "locked"}
    assert await answer(behind(proxy, postgres, mode="verify-full", ca_file=authority.ca_file, **files)) == 1
    with pytest.raises(StorageUnavailableError):
        await answer(behind(proxy, postgres, mode="verify-full", ca_file=authority.ca_file))


async def test_a_replaced_authority_is_trusted_by_the_next_connection(
    postgres: PostgresSettings, authority: Authority, stranger: Authority, new_proxy: NewProxy, tmp_path: Path
) -> None:
    """One Database, never restarted; the server gets a certificate of another authority, and the file of trusted ones follows."""
    trusted = tmp_path / "ca.pem"
    shutil.copy(authority.ca_file, trusted)
    proxy = new_proxy(postgres.port, authority.issue("server"), postgres=True)
    database = Database("sample", behind(proxy, postgres, mode="verify-full", ca_file=trusted))
    await database.check()
    proxy.use(stranger.issue("server"))
    await database.close()
    with pytest.raises(StorageUnavailableError):
        await database.check()
    shutil.copy(stranger.ca_file, trusted)
    await database.check()
    await database.close()


async def test_the_bootstrap_takes_tls_in_its_address(
    admin_url: SecretStr, postgres: PostgresSettings, authority: Authority, new_proxy: NewProxy
) -> None:
    proxy = new_proxy(postgres.port, authority.issue("server"), postgres=True)
    address = urlsplit(admin_url.get_secret_value())
    query = f"sslmode=verify-full&sslrootcert={quote(str(authority.ca_file))}"
    netloc = f"{address.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}"
    await bootstrap(SecretStr(address._replace(netloc=netloc, query=query).geturl()), {"sample": postgres})
    assert proxy.connections >= 1


async def test_redis_answers_over_tls(stack: Stack, authority: Authority, stranger: Authority, new_proxy: NewProxy) -> None:
    plain = urlsplit(stack.redis_url)
    proxy = new_proxy(plain.port, authority.issue("server"), client_authority=authority.ca_file)
    mine = authority.issue("client")
    for trusted, believed in ((authority, True), (stranger, False)):
        files = TlsFiles(ca_file=trusted.ca_file, certificate_file=mine.certificate_file, key_file=mine.key_file)
        settings = RedisSettings(
            url=f"rediss://127.0.0.1:{proxy.port}/0",
            password=SecretStr(plain.password or ""),
            tls=files,
            connect_timeout_seconds=10,
            timeout_seconds=10,
        )
        client = redis_client(settings)
        if believed:
            assert await client.ping()
        else:
            with pytest.raises(RedisError):
                await client.ping()
        await client.aclose()


# --- files ----------------------------------------------------------------------------------------------------------------


def refusal(**files: object) -> str:
    with pytest.raises(ValidationError) as wrong:
        TlsFiles.model_validate(files)
    return str(wrong.value)


def test_what_is_wrong_with_a_file_is_said(authority: Authority, tmp_path: Path) -> None:
    mine, other, locked = authority.issue("mine"), authority.issue("other"), authority.issue("locked", password="right")
    (tmp_path / "text").write_text("no certificate")
    both = {"certificate_file": locked.certificate_file, "key_file": locked.key_file}
    assert "cannot be read" in refusal(ca_file=tmp_path / "missing")
    assert "no certificate in PEM form" in refusal(ca_file=tmp_path / "text")
    assert "key_file" in refusal(certificate_file=mine.certificate_file, key_file=tmp_path / "missing")
    assert "does not belong" in refusal(certificate_file=mine.certificate_file, key_file=other.key_file)
    assert "belong to a certificate_file" in refusal(key_file=mine.key_file)
    assert "key_password is missing or wrong" in refusal(**both)
    assert "key_password is missing or wrong" in refusal(**both, key_password="wrong")
    assert TlsFiles.model_validate({**both, "key_password": "right"}).are_given


def test_an_empty_value_is_none() -> None:
    assert not TlsFiles.model_validate(dict.fromkeys(("ca_file", "certificate_file", "key_file", "key_password"), "")).are_given


def test_a_password_is_not_shown(authority: Authority) -> None:
    locked = authority.issue("locked", password="right")
    files = TlsFiles(certificate_file=locked.certificate_file, key_file=locked.key_file, key_password=SecretStr("right"))
    assert "right" not in f"{files!r} {files.model_dump_json()}"


@pytest.mark.parametrize("mode", ["disable", "prefer"])
def test_files_without_effect_are_refused(authority: Authority, mode: str) -> None:
    with pytest.raises(ValidationError, match="no effect in mode"):
        PostgresTls.model_validate({"mode": mode, "ca_file": authority.ca_file})
    with pytest.raises(ValidationError, match="use rediss://"):
        RedisSettings(url="redis://h:1/0", tls=TlsFiles(ca_file=authority.ca_file))


def test_an_address_of_redis_must_be_one() -> None:
    with pytest.raises(ValidationError, match="rediss://"):
        RedisSettings(url="http://h:1/0")


async def _handshake(context: ssl.SSLContext, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except (ssl.SSLError, OSError):
        return False
    writer.close()
    return True


async def test_files_under_replacement_leave_the_old_ones_in_use(
    stack: Stack, authority: Authority, stranger: Authority, new_proxy: NewProxy, tmp_path: Path
) -> None:
    trusted = tmp_path / "ca.pem"
    shutil.copy(authority.ca_file, trusted)
    proxy = new_proxy(urlsplit(stack.redis_url).port, authority.issue("server"))
    context = TlsFiles(ca_file=trusted).context()
    trusted.write_text("half of a certif")
    assert await _handshake(context, proxy.port)
    trusted.unlink()
    assert await _handshake(context, proxy.port)
    shutil.copy(stranger.ca_file, trusted)
    assert not await _handshake(context, proxy.port)


def test_older_versions_of_tls_are_not_spoken(authority: Authority) -> None:
    """What the context that the connections really use would offer."""
    context = TlsFiles(ca_file=authority.ca_file).context()
    connection = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")
    assert connection.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert connection.context.check_hostname
