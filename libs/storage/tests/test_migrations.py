import asyncio
import os
import shutil
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from pydantic import SecretStr
from sqlalchemy import text

from tessera.contracts.errors import FatalError
from tessera.storage import Database, PostgresSettings, connections
from tessera.storage.bootstrap import bootstrap
from tessera.storage.migrate import main
from tessera.storage.migrations import configuration, migrations_folder, upgrade

MIGRATIONS = Path(__file__).parent / "sample" / "migrations"


@pytest.mark.integration
async def test_many_at_once_run_each_revision_once(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    await bootstrap(admin_url, {"sample": empty_postgres})
    await asyncio.gather(*(asyncio.to_thread(asyncio.run, upgrade("sample", empty_postgres)) for _ in range(3)))
    database = Database("sample", empty_postgres)
    async with database.transaction() as connection:
        versions = await connection.execute(text("SELECT version_num FROM alembic_version"))
        assert versions.scalars().all() == ["0003"]
        assert await connection.scalar(text("SELECT indisvalid FROM pg_index WHERE indexrelid = 'word_text'::regclass"))
    await database.close()


@pytest.mark.integration
async def test_every_revision_can_be_undone(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    await bootstrap(admin_url, {"sample": empty_postgres})
    await upgrade("sample", empty_postgres)
    engine = connections.owner_engine("sample", empty_postgres)
    config = configuration("sample")
    async with engine.connect() as connection:
        config.attributes["connection"] = connection.sync_connection
        await connection.run_sync(lambda _: command.downgrade(config, "base"))
    await engine.dispose()
    owner = await connections.connect("sample", "owner", empty_postgres)
    left = await owner.fetch("SELECT relname FROM pg_class WHERE relnamespace = 'sample'::regnamespace AND relkind IN ('r', 'p')")
    await owner.close()
    assert [row["relname"] for row in left] == ["alembic_version"]


@pytest.mark.integration
async def test_a_database_of_an_earlier_version_gets_the_table_of_parked_events(
    admin_url: SecretStr, empty_postgres: PostgresSettings
) -> None:
    await bootstrap(admin_url, {"sample": empty_postgres})
    await upgrade("sample", empty_postgres, revision="0002")
    await upgrade("sample", empty_postgres)
    database = Database("sample", empty_postgres)
    async with database.transaction() as connection:
        await connection.execute(
            text(
                'INSERT INTO parked (consumer, topic, partition, "offset", state, code, message) '
                "VALUES ('sample.bulk', 't', 0, 1, 'refused', 'data_invalid', 'no')"
            )
        )
    await database.close()


@pytest.mark.integration
async def test_tables_and_sequences_made_later_are_the_workers_too(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.execute(text("INSERT INTO word VALUES ('t', 'x') ON CONFLICT DO NOTHING"))
        assert await connection.scalar(text("SELECT count(*) FROM word")) == 1


@pytest.mark.integration
async def test_without_a_password_of_the_owner_it_says_so(postgres: PostgresSettings) -> None:
    with pytest.raises(ValueError, match="owner_password"):
        await upgrade("sample", postgres.model_copy(update={"owner_password": None}))


@pytest.mark.integration
async def test_an_interrupted_run_leaves_no_lock(admin_url: SecretStr, empty_postgres: PostgresSettings) -> None:
    await bootstrap(admin_url, {"sample": empty_postgres})
    holder = await connections.connect("sample", "owner", empty_postgres)
    await holder.execute("SELECT pg_advisory_lock(hashtextextended('tessera.migrate.sample', 0))")
    waiting = asyncio.create_task(upgrade("sample", empty_postgres))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await asyncio.shield(waiting)
    await holder.close()
    await waiting


@pytest.mark.unit
def test_migrations_are_found_in_a_checkout() -> None:
    assert migrations_folder("sample") == MIGRATIONS


@pytest.mark.unit
def test_migrations_are_found_in_an_installed_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tessera" / "packaged"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(MIGRATIONS, package / "migrations")
    monkeypatch.syspath_prepend(tmp_path)
    assert migrations_folder("packaged") == package / "migrations"


@pytest.mark.unit
@pytest.mark.parametrize("service", ["nowhere", "storage"])
def test_a_service_without_migrations_is_named(service: str) -> None:
    with pytest.raises(FatalError, match=service):
        configuration(service)


@pytest.mark.unit
def test_running_alembic_itself_points_to_the_command() -> None:
    with pytest.raises(FatalError, match=r"tessera\.storage\.migrate sample"):
        command.upgrade(configuration("sample"), "head")


def environment(monkeypatch: pytest.MonkeyPatch, settings: PostgresSettings) -> None:
    for name, value in {"HOST": settings.host, "PORT": str(settings.port), "DATABASE": settings.database}.items():
        monkeypatch.setenv(f"TESSERA__POSTGRES__{name}", value)
    for role in ("OWNER", "WORKER", "CLIENT"):
        monkeypatch.setenv(f"TESSERA_SAMPLE__POSTGRES__{role}_PASSWORD", f"{role.lower()}'s password")


@pytest.mark.integration
def test_the_command_migrates(postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment(monkeypatch, postgres)
    assert main(["sample"]) == 0
    assert capsys.readouterr().out == "migrate sample: up to date\n"


@pytest.mark.integration
def test_a_database_of_a_newer_version_is_told(
    admin_url: SecretStr, empty_postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def made_by_a_newer_version() -> None:
        await bootstrap(admin_url, {"sample": empty_postgres})
        await upgrade("sample", empty_postgres)
        owner = await connections.connect("sample", "owner", empty_postgres)
        try:
            await owner.execute("UPDATE alembic_version SET version_num = '9999'")
        finally:
            await owner.close()

    asyncio.run(made_by_a_newer_version())
    environment(monkeypatch, empty_postgres)
    assert main(["sample"]) == 1
    told = capsys.readouterr().err
    assert "'9999'" in told
    assert "A newer version of Tessera made this database" in told


@pytest.mark.integration
def test_the_command_tells_what_postgres_refused(
    postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(monkeypatch, postgres)
    monkeypatch.setenv("TESSERA_SAMPLE__POSTGRES__DATABASE", "not_there")
    assert main(["sample"]) == 1
    assert "not_there" in capsys.readouterr().err


@pytest.mark.unit
def test_the_command_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.startswith("TESSERA")]:
        monkeypatch.delenv(name)
    assert main(["sample"]) == 2
    assert "worker_password" in capsys.readouterr().err


@pytest.mark.integration
def test_asyncpg_speaks_to_the_owner_in_its_schema(postgres: PostgresSettings) -> None:
    async def where() -> tuple[str, str]:
        owner: asyncpg.Connection = await connections.connect("sample", "owner", postgres)
        row = await owner.fetchrow("SELECT current_schema, current_setting('lock_timeout') AS patience")
        await owner.close()
        return row["current_schema"], row["patience"]

    assert asyncio.run(where()) == ("sample", "30s")
