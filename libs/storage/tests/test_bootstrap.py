import asyncio

import asyncpg
import pytest
from pydantic import SecretStr

from tessera.contracts.errors import FatalError
from tessera.storage import Database, PostgresSettings
from tessera.storage import bootstrap as module
from tessera.storage.bootstrap import bootstrap, main

pytestmark = pytest.mark.integration


async def admin_query(admin_url: SecretStr, statement: str, *arguments: object) -> list[asyncpg.Record]:
    admin = await asyncpg.connect(admin_url.get_secret_value())
    try:
        rows: list[asyncpg.Record] = await admin.fetch(statement, *arguments)
        return rows
    finally:
        await admin.close()


async def usable(service: str, settings: PostgresSettings) -> None:
    database = Database(service, settings)
    await database.check()
    async with database.reading("t"):
        pass
    await database.close()


async def test_twice_and_at_once_is_the_same_as_once(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    await asyncio.gather(*(bootstrap(admin_url, {"sample": empty_postgres, "sampletwo": empty_postgres}) for _ in range(3)))
    await bootstrap(admin_url, {"sample": empty_postgres})
    await usable("sample", empty_postgres)
    await usable("sampletwo", empty_postgres)


async def test_services_cannot_enter_others_schemas(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    await bootstrap(admin_url, {"sample": empty_postgres, "sampletwo": empty_postgres})
    allowed = await admin_query(
        empty_url(admin_url, empty_postgres),
        "SELECT rolname FROM pg_roles WHERE rolname LIKE 'tessera_sampletwo_%' AND has_schema_privilege(rolname, 'sample', 'USAGE')",
    )
    assert allowed == []


def empty_url(admin_url: SecretStr, settings: PostgresSettings) -> SecretStr:
    return module._in_database(admin_url, settings.database)


async def test_a_changed_password_is_set(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    await bootstrap(admin_url, {"samplethree": empty_postgres})
    changed = empty_postgres.model_copy(update={"worker_password": SecretStr("another one")})
    await bootstrap(admin_url, {"samplethree": changed})
    await usable("samplethree", changed)


async def test_the_server_never_holds_a_password(admin_url: SecretStr, postgres: PostgresSettings) -> None:
    stored = await admin_query(admin_url, "SELECT rolpassword FROM pg_authid WHERE rolname LIKE 'tessera_sample_%'")
    assert stored
    assert all(row["rolpassword"].startswith("SCRAM-SHA-256$4096:") for row in stored)


async def test_the_extension_is_in_public_and_the_public_cannot_enter(admin_url: SecretStr, postgres: PostgresSettings) -> None:
    inside = empty_url(admin_url, postgres)
    schema = await admin_query(inside, "SELECT extnamespace::regnamespace::text AS schema FROM pg_extension WHERE extname = 'vector'")
    public = await admin_query(inside, "SELECT has_database_privilege('public', current_database(), 'CONNECT') AS allowed")
    assert (schema[0]["schema"], public[0]["allowed"]) == ("public", False)


async def test_an_authenticator_is_made_only_where_it_has_a_password(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    without = empty_postgres.model_copy(update={"authenticator_password": None})
    await bootstrap(admin_url, {"samplefour": empty_postgres, "samplefive": without})
    found = await admin_query(admin_url, r"SELECT rolname FROM pg_roles WHERE rolname ~ '^tessera_samplef.*_authenticator$'")
    assert [row["rolname"] for row in found] == ["tessera_samplefour_authenticator"]


async def test_an_old_server_is_refused(admin_url: SecretStr, empty_postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIMUM_SERVER", 990000)
    with pytest.raises(FatalError, match="Postgres 99 or newer"):
        await bootstrap(admin_url, {"sample": empty_postgres})


def environment(monkeypatch: pytest.MonkeyPatch, admin_url: SecretStr, settings: PostgresSettings) -> None:
    monkeypatch.setenv("TESSERA_ADMIN_DATABASE_URL", admin_url.get_secret_value())
    for name, value in {
        "HOST": settings.host,
        "PORT": str(settings.port),
        "DATABASE": settings.database,
        **{f"{role.upper()}_PASSWORD": settings.password(role).get_secret_value() for role in ("owner", "worker", "client")},
    }.items():
        monkeypatch.setenv(f"TESSERA__POSTGRES__{name}", value)


def test_the_command_makes_what_the_environment_names(
    admin_url: SecretStr, empty_postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(monkeypatch, admin_url, empty_postgres)
    assert main(["sample"]) == 0
    assert capsys.readouterr().out == "bootstrap: ready for sample\n"


def test_the_command_names_what_is_missing(
    admin_url: SecretStr, empty_postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(monkeypatch, admin_url, empty_postgres)
    monkeypatch.delenv("TESSERA__POSTGRES__WORKER_PASSWORD")
    assert main(["sample"]) == 2
    assert "worker_password" in capsys.readouterr().err


def test_the_command_asks_for_the_administrators_address(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TESSERA_ADMIN_DATABASE_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert main(["sample"]) == 2
    assert "TESSERA_ADMIN_DATABASE_URL" in capsys.readouterr().err


def test_the_command_says_when_there_is_no_server(
    admin_url: SecretStr, empty_postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(monkeypatch, SecretStr("postgresql://postgres:hidden@127.0.0.1:1/postgres"), empty_postgres)
    assert main(["sample"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("bootstrap: ")
    assert "hidden" not in told
