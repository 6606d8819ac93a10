"""Without its Postgres the generator says that it is not ready, loses nothing, and goes on when it is back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from tessera.generator.ports import NewJob
from tessera.testkit import PostgresDatabase, ServiceProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
NewJobs = Callable[..., NewJob]


class Connections:
    """Whether anybody but the administrator may use this module's database."""

    def __init__(self, administrator: asyncpg.Connection, name: str) -> None:
        self._administrator = administrator
        self._name = name

    async def cut(self) -> None:
        await self._administrator.execute(f'ALTER DATABASE "{self._name}" WITH ALLOW_CONNECTIONS false')
        await self._administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", self._name)

    async def give_back(self) -> None:
        await self._administrator.execute(f'ALTER DATABASE "{self._name}" WITH ALLOW_CONNECTIONS true')


@pytest.fixture
async def connections(prepared: PostgresDatabase) -> AsyncIterator[Connections]:
    administrator = await asyncpg.connect(prepared.stack.database_url)
    connections = Connections(administrator, prepared.name)
    yield connections
    await connections.give_back()
    await administrator.close()


@pytest.fixture(scope="module")
def service(new_generator: Callable[..., ServiceProcess]) -> ServiceProcess:
    """One generator, which outlives every outage, and keeps what it has begun for as long."""
    process = new_generator(TESSERA_GENERATOR__LEASE_SECONDS="120")
    process.start()
    process.wait_ready()
    return process


async def test_postgres_goes_and_comes_back(others: Any, connections: Connections, service: ServiceProcess, new_job: NewJobs) -> None:
    await others.end_of(await others.ask(new_job("local/quote")))
    await connections.cut()
    await eventually(lambda: service.readiness("postgres") == (503, "unavailable", "open"))
    assert service.get_admin("/health/live")[0] == 200
    waiting = await others.ask(new_job("local/quote"))
    await connections.give_back()
    assert (await others.end_of(waiting)).type.endswith("completed.v1")
    await eventually(lambda: service.readiness("postgres")[::2] == (200, "closed"))
    assert service.exit_code is None


async def test_a_providers_stream_goes_on_while_postgres_is_away(
    others: Any, upstream: Any, connections: Connections, service: ServiceProcess, new_job: NewJobs
) -> None:
    upstream.streams_endlessly()
    generation_id = await others.ask(new_job("up"))
    await others.spoken(generation_id, chunks=3)
    await connections.cut()
    await eventually(lambda: service.readiness("postgres") == (503, "unavailable", "open"))
    await others.spoken(generation_id, chunks=len(others.chunks(generation_id)) + 10)
    await connections.give_back()
    await others.cancel(generation_id)
    end = await others.end_of(generation_id)
    told = [{key: value for key, value in record.items() if key != "exception"} for record in service.log_records()[-40:]]
    assert (end.data["problem"]["code"], end.data["attempt"]) == ("generation_cancelled", 1), told
    assert len(upstream.requests) == 1
