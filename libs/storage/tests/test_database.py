import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tessera.resilience import CircuitOpenError, TimedOutError, deadline
from tessera.storage import (
    Database,
    DirectStatement,
    PostgresSettings,
    StorageConflictError,
    StorageTimeoutError,
    StorageUnavailableError,
)
from tessera.storage.delivery import outbox_channel
from tessera.testkit.waiting import eventually

pytestmark = pytest.mark.integration

SESSION = text("SELECT pg_backend_pid()")
ADD = text("INSERT INTO note (tenant_id, id, body) VALUES (:tenant, :id, 'x')")


async def count(database: Database, tenant: str) -> int:
    async with database.reading(tenant) as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM note")) or 0)


async def end_session(admin_url: SecretStr, session: int) -> None:
    admin = await asyncpg.connect(admin_url.get_secret_value())
    assert await admin.fetchval("SELECT pg_terminate_backend($1, 5000)", session)
    await admin.close()


async def execute(database: Database, *statement: Any) -> None:
    async with database.transaction() as connection:
        await connection.execute(*statement)


class Forwarder:
    """Passes bytes between a port of its own and Postgres, and can be cut."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._target = (settings.host, settings.port)
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def stall(self) -> None:
        """From now on nothing is passed on, and nobody is told."""
        self._flowing.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, other_writer]
        await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
        writer.close()


@pytest.fixture
async def forwarder(postgres: PostgresSettings) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(postgres)
    await forwarder.start()
    yield forwarder
    await forwarder.cut()


@asynccontextmanager
async def opened(settings: PostgresSettings) -> AsyncIterator[Database]:
    database = Database("sample", settings)
    try:
        yield database
    finally:
        await database.close()


async def test_commits_at_the_end(database: Database, tenant: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(ADD, {"tenant": tenant, "id": 1})
    assert await count(database, tenant) == 1


async def test_rolls_back_when_the_block_raises_and_passes_the_error_on(database: Database, tenant: str) -> None:
    async def work() -> None:
        async with database.transaction() as connection:
            await connection.execute(ADD, {"tenant": tenant, "id": 1})
            raise KeyError

    with pytest.raises(KeyError):
        await work()
    assert await count(database, tenant) == 0


async def test_cancellation_rolls_back_and_leaves_the_pool_usable(database: Database, tenant: str) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with database.transaction() as connection:
            await connection.execute(ADD, {"tenant": tenant, "id": 1})
            inside.set()
            await connection.execute(text("SELECT pg_sleep(30)"))

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await count(database, tenant) == 0
    assert database.breaker.state == "closed"


@pytest.mark.timeout(60)
async def test_a_connection_whose_direct_statement_was_given_up_is_not_used_again(postgres: PostgresSettings) -> None:
    session = DirectStatement("SELECT pg_backend_pid() AS pid")
    sessions: list[int] = []

    async def work(database: Database) -> None:
        async with database.driver() as driver:
            sessions.append((await session.row(driver, {}))["pid"])
            await DirectStatement("SELECT pg_sleep(30)").rows(driver, {})

    async with opened(postgres.model_copy(update={"pool_size": 1, "max_overflow": 0})) as database:
        task = asyncio.create_task(work(database))
        await eventually(lambda: sessions, timedelta(seconds=10))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with database.driver() as driver:
            assert (await session.row(driver, {}))["pid"] not in sessions
        assert database.breaker.state == "closed"


async def test_a_wrong_statement_keeps_its_own_error_and_does_not_count_as_failure(postgres: PostgresSettings, tenant: str) -> None:
    async with opened(postgres.model_copy(update={"breaker_failure_threshold": 1})) as database:
        with pytest.raises(IntegrityError):
            await execute(database, ADD, [{"tenant": tenant, "id": 1}, {"tenant": tenant, "id": 1}])
        assert database.breaker.state == "closed"


async def test_an_error_does_not_carry_what_was_to_be_written(database: Database, tenant: str) -> None:
    statement = text("INSERT INTO note (tenant_id, id, body) VALUES (:tenant, 1, :body), (:tenant, 1, :body)")
    with pytest.raises(IntegrityError) as caught:
        await execute(database, statement, {"tenant": tenant, "body": "The key is under the mat."})
    assert "INSERT INTO note" in str(caught.value)
    assert "under the mat" not in str(caught.value)


async def test_a_long_statement_is_a_timeout(postgres: PostgresSettings) -> None:
    async with opened(postgres.model_copy(update={"statement_timeout_seconds": 0.05})) as database:
        with pytest.raises(StorageTimeoutError):
            await execute(database, text("SELECT pg_sleep(5)"))


async def test_a_long_transaction_is_ended_by_postgres(database: Database) -> None:
    async def work() -> None:
        async with database.transaction() as connection:
            await connection.execute(text("SET LOCAL transaction_timeout = 0"))  # a clock that runs is not set again
            await connection.execute(text("SET LOCAL transaction_timeout = '50ms'"))
            await connection.execute(text("SELECT pg_sleep(5)"))

    with pytest.raises(StorageTimeoutError):
        await work()
    assert database.breaker.state == "closed"


@pytest.mark.parametrize("role", ["worker", "client"])
async def test_roles_carry_the_transaction_timeout(database: Database, role: str) -> None:
    async with database.transaction() if role == "worker" else database.writing("t") as connection:
        assert await connection.scalar(text("SELECT current_setting('transaction_timeout')")) == "30s"


async def test_a_deadlock_is_a_conflict_for_one_of_the_two(database: Database, tenant: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(ADD, [{"tenant": tenant, "id": 1}, {"tenant": tenant, "id": 2}])
    meeting = asyncio.Barrier(2)
    update = text("UPDATE note SET body = 'y' WHERE tenant_id = :tenant AND id = :id")

    async def change(first: int, second: int) -> None:
        async with database.transaction() as connection:
            await connection.execute(update, {"tenant": tenant, "id": first})
            await meeting.wait()
            await connection.execute(update, {"tenant": tenant, "id": second})

    outcomes = await asyncio.gather(change(1, 2), change(2, 1), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "StorageConflictError"]
    assert any(isinstance(outcome, StorageConflictError) for outcome in outcomes)


async def test_no_free_connection_is_unavailable(postgres: PostgresSettings) -> None:
    async with opened(postgres.model_copy(update={"pool_size": 1, "max_overflow": 0, "pool_timeout_seconds": 0.05})) as database:
        holding = database.transaction()
        await holding.__aenter__()
        with pytest.raises(StorageUnavailableError, match="free"):
            await database.check()
        await holding.__aexit__(None, None, None)


async def test_a_server_that_takes_no_writes_is_unavailable(database: Database, tenant: str) -> None:
    async def write() -> None:
        async with database.transaction() as connection:
            await connection.execute(text("SET TRANSACTION READ ONLY"))
            await connection.execute(ADD, {"tenant": tenant, "id": 1})

    with pytest.raises(StorageUnavailableError, match="25006"):
        await write()


async def test_a_lost_connection_is_unavailable_and_the_next_transaction_works(database: Database, admin_url: SecretStr) -> None:
    async def work() -> None:
        async with database.transaction() as connection:
            await end_session(admin_url, int(await connection.scalar(SESSION) or 0))
            await connection.execute(text("SELECT 1"))

    with pytest.raises(StorageUnavailableError):
        await work()
    await database.check()


@pytest.mark.parametrize("idle_seconds", [0.0, 60.0])
async def test_a_connection_lost_while_idle_is_not_noticed(postgres: PostgresSettings, admin_url: SecretStr, idle_seconds: float) -> None:
    async with opened(postgres.model_copy(update={"pre_ping_idle_seconds": idle_seconds})) as database:
        async with database.transaction() as connection:
            before = await connection.scalar(SESSION)
        await end_session(admin_url, int(before or 0))
        async with database.transaction() as connection:
            assert await connection.scalar(SESSION) != before


async def test_a_healthy_connection_is_used_again(postgres: PostgresSettings) -> None:
    async with opened(postgres.model_copy(update={"pre_ping_idle_seconds": 0.0})) as database:
        sessions = set()
        for _ in range(3):
            async with database.transaction() as connection:
                sessions.add(await connection.scalar(SESSION))
        assert len(sessions) == 1


async def test_without_pre_ping_a_lost_connection_is_told(postgres: PostgresSettings, admin_url: SecretStr) -> None:
    async with opened(postgres.model_copy(update={"pre_ping": False})) as database:
        async with database.transaction() as connection:
            session = await connection.scalar(SESSION)
        await end_session(admin_url, int(session or 0))
        with pytest.raises(StorageUnavailableError):
            await database.check()


async def test_an_old_connection_is_replaced(postgres: PostgresSettings) -> None:
    async with opened(postgres.model_copy(update={"recycle_seconds": 0})) as database:
        sessions = []
        for _ in range(2):
            async with database.transaction() as connection:
                sessions.append(await connection.scalar(SESSION))
            await asyncio.sleep(0)
        assert sessions[0] != sessions[1]


async def test_breaker_opens_when_postgres_is_gone_and_closes_when_it_is_back(postgres: PostgresSettings, forwarder: Forwarder) -> None:
    settings = postgres.model_copy(update={"host": "127.0.0.1", "port": forwarder.port, "breaker_failure_threshold": 2})
    async with opened(settings) as database:
        await database.check()
        await forwarder.cut()
        for _ in range(2):
            with pytest.raises(StorageUnavailableError):
                await database.check()
        with pytest.raises(CircuitOpenError) as raised:
            await database.check()
        assert timedelta(0) < raised.value.retry_after <= timedelta(seconds=0.2)
        await forwarder.start()

        async def recovered() -> bool:
            try:
                await database.check()
            except (CircuitOpenError, StorageUnavailableError):
                return False
            return True

        await eventually(recovered)
        assert database.breaker.state == "closed"


async def test_a_server_that_falls_silent_is_unavailable(postgres: PostgresSettings, forwarder: Forwarder) -> None:
    patience = {"host": "127.0.0.1", "port": forwarder.port, "statement_timeout_seconds": 0.2, "answer_grace_seconds": 0.1}
    async with opened(postgres.model_copy(update=patience)) as database:
        await database.check()
        forwarder.stall()
        with pytest.raises(StorageUnavailableError, match="did not answer"):
            await database.check()
        await forwarder.cut()


async def test_a_callers_own_time_out_is_not_postgres_fault(database: Database) -> None:
    with pytest.raises(TimedOutError):
        async with deadline(0.05):
            await execute(database, text("SELECT pg_sleep(5)"))
    with pytest.raises(TimeoutError) as raised:
        await execute_within(database, 0.05, text("SELECT pg_sleep(5)"))
    assert type(raised.value) is TimeoutError
    assert database.breaker.state == "closed"


async def execute_within(database: Database, seconds: float, *statement: Any) -> None:
    async with database.transaction() as connection, asyncio.timeout(seconds):
        await connection.execute(*statement)


async def test_a_database_that_is_closed_to_connections_is_unavailable(postgres: PostgresSettings, admin_url: SecretStr) -> None:
    """As an administrator closes it for maintenance: an error that the server gives to no statement."""
    admin = await asyncpg.connect(admin_url.get_secret_value())
    try:
        await admin.execute(f'ALTER DATABASE "{postgres.database}" WITH ALLOW_CONNECTIONS false')
        async with opened(postgres.model_copy(update={"breaker_failure_threshold": 1})) as database:
            with pytest.raises(StorageUnavailableError):
                await database.check()
            assert database.breaker.state == "open"
            with pytest.raises(StorageUnavailableError):
                await database.connect()
    finally:
        await admin.execute(f'ALTER DATABASE "{postgres.database}" WITH ALLOW_CONNECTIONS true')
        await admin.close()


async def test_a_wrong_password_is_unavailable_and_not_in_the_message(postgres: PostgresSettings) -> None:
    async with opened(postgres.model_copy(update={"worker_password": SecretStr("not it at all")})) as database:
        with pytest.raises(StorageUnavailableError) as raised:
            await database.check()
    assert "not it at all" not in str(raised.value)


async def test_a_server_without_tls_is_refused_where_tls_is_required(postgres: PostgresSettings) -> None:
    required = PostgresSettings.model_validate({**postgres.model_dump(), "tls": {"mode": "require"}})
    async with opened(required) as database:
        with pytest.raises(StorageUnavailableError):
            await database.check()


async def test_on_connect_sees_every_new_connection(postgres: PostgresSettings) -> None:
    seen: list[asyncpg.Connection] = []

    async def remember(connection: asyncpg.Connection) -> None:
        seen.append(connection)

    async with opened(postgres) as database:
        database.on_connect(remember)
        await database.check()
        await database.check()
        async with database.reading("t"):
            pass
    assert len(seen) == 2  # one per role


async def test_a_closed_database_opens_again_on_use(database: Database) -> None:
    await database.check()
    await database.close()
    await database.close()
    await database.check()


async def test_outbox_insert_notifies_the_services_channel_after_commit(database: Database) -> None:
    told = asyncio.Event()
    listener = await database.connect()
    await listener.add_listener(outbox_channel("sample"), lambda *_: told.set())
    async with database.transaction() as connection:
        await connection.execute(
            text("INSERT INTO outbox (event_id, topic, headers, value) VALUES (:id, 'topic', '{\"ce_id\": \"1\"}', '\\x00')"),
            {"id": uuid4()},
        )
        assert not told.is_set()
    async with asyncio.timeout(5):
        await told.wait()
    await listener.close()


async def test_direct_connection_to_a_missing_server_is_unavailable(postgres: PostgresSettings) -> None:
    database = Database("sample", postgres.model_copy(update={"port": 1}))
    with pytest.raises(StorageUnavailableError):
        await database.connect()
