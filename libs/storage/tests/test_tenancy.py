import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from tessera.contracts.errors import InvalidError
from tessera.storage import Database
from tessera.storage.errors import sqlstate

pytestmark = pytest.mark.integration

ADD = text("INSERT INTO note (tenant_id, id, body) VALUES (:tenant, :id, 'x')")
COUNT = text("SELECT count(*) FROM note")
DENIED, ROW_REFUSED, READ_ONLY = "42501", "42501", "25006"


async def add(database: Database, tenant: str, rows: int = 1) -> None:
    async with database.transaction() as connection:
        await connection.execute(ADD, [{"tenant": tenant, "id": number} for number in range(rows)])


async def test_client_sees_only_its_tenants_rows(database: Database, tenant: str) -> None:
    await add(database, tenant, 3)
    await add(database, f"{tenant}-other", 5)
    async with database.reading(tenant) as connection:
        assert await connection.scalar(COUNT) == 3


async def test_client_naming_another_tenant_in_a_query_sees_nothing(database: Database, tenant: str) -> None:
    await add(database, f"{tenant}-other")
    async with database.reading(tenant) as connection:
        assert await connection.scalar(text("SELECT count(*) FROM note WHERE tenant_id = :other"), {"other": f"{tenant}-other"}) == 0


async def test_client_without_a_tenant_sees_nothing(database: Database, tenant: str) -> None:
    await add(database, tenant)
    async with database.writing(tenant) as connection:
        await connection.execute(text("SELECT set_config('app.tenant', '', true)"))
        assert await connection.scalar(COUNT) == 0


async def test_tenant_does_not_outlive_its_transaction(database: Database, tenant: str) -> None:
    await add(database, tenant)
    async with database.reading(tenant) as connection:
        session = await connection.scalar(text("SELECT pg_backend_pid()"))
    async with database._transaction("client") as connection:  # the pool hands out the same session, now without a tenant
        assert await connection.scalar(text("SELECT pg_backend_pid()")) == session
        assert await connection.scalar(COUNT) == 0


async def test_an_empty_tenant_is_refused_before_anything_is_asked(database: Database) -> None:
    with pytest.raises(InvalidError) as raised:
        async with database.reading(""):
            pass
    assert raised.value.code == "tenant_required"


async def test_client_cannot_write_another_tenants_row(database: Database, tenant: str) -> None:
    with pytest.raises(DBAPIError) as raised:
        async with database.writing(tenant) as connection:
            await connection.execute(ADD, {"tenant": f"{tenant}-other", "id": 1})
    assert sqlstate(raised.value) == ROW_REFUSED


async def test_client_can_write_where_granted(database: Database, tenant: str) -> None:
    async with database.writing(tenant) as connection:
        await connection.execute(ADD, {"tenant": tenant, "id": 1})
    async with database.reading(tenant) as connection:
        assert await connection.scalar(COUNT) == 1


async def test_reading_is_read_only(database: Database, tenant: str) -> None:
    with pytest.raises(DBAPIError) as raised:
        async with database.reading(tenant) as connection:
            await connection.execute(ADD, {"tenant": tenant, "id": 1})
    assert sqlstate(raised.value) == READ_ONLY


async def test_reading_is_one_snapshot(database: Database, tenant: str) -> None:
    async with database.reading(tenant) as connection:
        assert await connection.scalar(COUNT) == 0
        await add(database, tenant)
        assert await connection.scalar(COUNT) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE note SET body = 'y'",
        "DELETE FROM note",
        "SELECT * FROM note_0",
        "SELECT * FROM note_1",
        "SELECT * FROM credential",
        "SELECT tenant_of('x')",
        "SELECT * FROM inbox",
        "SELECT * FROM outbox",
        "INSERT INTO outbox (event_id, topic, headers, value) VALUES (gen_random_uuid(), 't', '{}', '')",
        "SELECT * FROM consumer_position",
        "SELECT * FROM parked",
        "SELECT * FROM alembic_version",
        "CREATE TABLE mine (x int)",
        "CREATE TABLE public.mine (x int)",
        "CREATE TEMPORARY TABLE mine (x int)",
        "SET ROLE tessera_sample_worker",
    ],
)
async def test_client_is_denied_what_was_not_granted(database: Database, tenant: str, statement: str) -> None:
    with pytest.raises(ProgrammingError) as raised:
        async with database.writing(tenant) as connection:
            await connection.execute(text(statement))
    assert sqlstate(raised.value) == DENIED


@pytest.mark.parametrize(
    "statement", ["DROP TABLE note", "ALTER TABLE note DISABLE ROW LEVEL SECURITY", "UPDATE alembic_version SET version_num = '9'"]
)
async def test_worker_cannot_change_the_schema(database: Database, statement: str) -> None:
    with pytest.raises(ProgrammingError) as raised:
        async with database.transaction() as connection:
            await connection.execute(text(statement))
    assert sqlstate(raised.value) == DENIED


async def test_roles_can_neither_bypass_security_nor_own_tables(database: Database) -> None:
    async with database.transaction() as connection:
        powers = await connection.execute(
            text(
                "SELECT rolname, rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication AS powerful FROM pg_roles"
                r" WHERE rolname LIKE 'tessera\_sample\_%'"
            )
        )
        owned = await connection.scalar(
            text("SELECT count(*) FROM pg_class WHERE relowner IN ('tessera_sample_worker'::regrole, 'tessera_sample_client'::regrole)")
        )
        roles = {row.rolname: row.powerful for row in powers}
    assert roles == {f"tessera_sample_{role}": False for role in ("owner", "worker", "client", "authenticator")}
    assert owned == 0


async def test_every_table_forces_row_level_security(database: Database) -> None:
    async with database.transaction() as connection:
        open_tables = await connection.execute(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = 'sample'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition"
                " AND NOT (relrowsecurity AND relforcerowsecurity) AND relname NOT IN ('alembic_version', 'word')"
            )
        )
        assert open_tables.scalars().all() == []


async def test_a_definer_function_of_the_owner_sees_rows_where_the_owner_was_let_in(database: Database, tenant: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(text("INSERT INTO credential VALUES (:tenant, :digest)"), {"tenant": tenant, "digest": tenant.encode()})
        assert await connection.scalar(text("SELECT tenant_of(:digest)"), {"digest": tenant.encode()}) == tenant


async def test_the_authenticator_may_look_up_and_nothing_else(database: Database, tenant: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(text("INSERT INTO credential VALUES (:tenant, :digest)"), {"tenant": tenant, "digest": tenant.encode()})
    async with database.authenticating() as connection:
        assert await connection.scalar(text("SELECT tenant_of(:digest)"), {"digest": tenant.encode()}) == tenant
    for table in ("credential", "note", "inbox", "alembic_version"):
        with pytest.raises(ProgrammingError) as raised:
            async with database.authenticating() as connection:
                await connection.execute(text(f"SELECT * FROM {table}"))
        assert sqlstate(raised.value) == DENIED


PARK = text(
    'INSERT INTO parked (consumer, topic, partition, "offset", tenant_id, state, code, message, record_milliseconds, headers, value) '
    "VALUES ('sample.bulk', :tenant, 0, 1, :tenant, 'stuck', 'busy', 'not yet', 1, '[]', 'content')"
)


async def test_client_sees_which_of_its_tenants_events_are_parked_but_not_what_is_in_them(database: Database, tenant: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(PARK, {"tenant": tenant})
    seen = text('SELECT topic, "offset", state, code FROM parked')
    async with database.reading(tenant) as connection:
        assert [tuple(row) for row in await connection.execute(seen)] == [(tenant, 1, "stuck", "busy")]
    async with database.reading(f"other-{tenant}") as connection:
        assert not (await connection.execute(seen)).all()
    with pytest.raises(ProgrammingError) as raised:
        async with database.reading(tenant) as connection:
            await connection.execute(text("SELECT value FROM parked"))
    assert sqlstate(raised.value) == DENIED
