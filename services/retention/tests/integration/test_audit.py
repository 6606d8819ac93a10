"""The audit trail: kept once, never changed, and told to whom it belongs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tessera.contracts.events import AuditActor, AuditInspected, AuditRecorded, AuditReported, AuditTarget, RequestFailed
from tessera.storage import Database
from tessera.storage.connections import owner_engine
from tessera.testkit.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("service")]

REPLY_PARTITION = 3
BEGAN = datetime(2026, 11, 20, tzinfo=UTC)
CHANGES = (
    "UPDATE audit_events SET action = 'key.create'",
    "DELETE FROM audit_events",
    "DELETE FROM audit_events WHERE false",
    "TRUNCATE audit_events",
)


def act(tenant: str | None, number: int = 0, *, action: str = "key.revoke", actor: str = "k-1", target: str = "t-1") -> AuditRecorded:
    return AuditRecorded(
        action=action,
        outcome="succeeded",
        actor=AuditActor(kind="key", id=actor, tenant="operators"),
        tenant=tenant,
        target=AuditTarget(kind="key", id=target),
        occurred_at=BEGAN + timedelta(seconds=number),
    )


@pytest.fixture
def ask(wire: Any) -> Callable[..., Any]:
    async def asked(asker: str | None = None, **question: Any) -> AuditReported:
        inspected = AuditInspected(reply_partition=REPLY_PARTITION, **question)
        told = await wire.ask("audit.inspected", inspected, AuditReported, tenant=asker)
        assert isinstance(told, AuditReported)
        return told

    return asked


@pytest.fixture
def kept(wire: Any, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Sends acts and waits until so many of the tenant are kept."""

    async def keep(*acts: AuditRecorded) -> list[str]:
        ids = [await wire.send("audit.recorded", one, key=b"tenant") for one in acts]

        async def all_there() -> bool:
            found = {entry.id for entry in (await ask(whole_platform=True, limit=100)).entries}
            assert set(ids) <= found
            return True

        await eventually(all_there)
        return ids

    return keep


async def test_an_act_is_kept_once_however_often_it_comes(wire: Any, kept: Any, ask: Any) -> None:
    (first,) = await kept(act(wire.tenant))
    await wire.send("audit.recorded", act(wire.tenant), key=b"tenant", id=first)
    await kept(act(wire.tenant, 1))
    assert [entry.record for entry in (await ask()).entries] == [act(wire.tenant, 1), act(wire.tenant)]


async def test_it_is_kept_once_also_without_an_inbox(wire: Any, kept: Any, ask: Any, database: Database) -> None:
    """A rebuild reads the log again with an inbox that knows nothing."""
    (first,) = await kept(act(wire.tenant))
    async with database.transaction() as connection:
        await connection.execute(text("DELETE FROM inbox WHERE tenant_id = :tenant"), {"tenant": wire.tenant})
    await wire.send("audit.recorded", act(wire.tenant), key=b"tenant", id=first)
    await kept(act(wire.tenant, 1))
    assert len((await ask()).entries) == 2


@pytest.mark.parametrize("statement", CHANGES)
async def test_the_workers_role_may_not_change_it(wire: Any, kept: Any, ask: Any, database: Database, statement: str) -> None:
    await kept(act(wire.tenant))
    with pytest.raises(DBAPIError, match="permission denied"):
        await _execute(database, statement)
    assert [entry.record for entry in (await ask()).entries] == [act(wire.tenant)]


async def _execute(database: Database, statement: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(text(statement))


@pytest.mark.parametrize("statement", CHANGES)
async def test_whoever_has_every_privilege_is_refused_by_the_table_itself(world: Any, statement: str) -> None:
    administrator = await asyncpg.connect(world.database.admin_url)
    try:
        with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
            await administrator.execute(statement.replace("audit_events", "retention.audit_events"))
    finally:
        await administrator.close()
    engine = owner_engine("retention", world.database.settings("retention"))
    try:
        async with engine.connect() as owner:
            with pytest.raises(DBAPIError, match="append-only"):
                await owner.execute(text(statement))
    finally:
        await engine.dispose()


async def test_a_tenant_is_told_of_itself_alone(wire: Any, kept: Any, ask: Any) -> None:
    other = f"o{uuid4().hex[:12]}"
    await kept(act(wire.tenant, 1), act(other, 2), act(None, 3))
    assert {entry.record.tenant for entry in (await ask()).entries} == {wire.tenant}
    assert {entry.record.tenant for entry in (await ask(tenant=other)).entries} == {wire.tenant}
    assert {entry.record.tenant for entry in (await ask(other)).entries} == {other}
    assert {entry.record.tenant for entry in (await ask(whole_platform=True, tenant=other)).entries} == {other}
    assert {wire.tenant, other, None} <= {entry.record.tenant for entry in (await ask(whole_platform=True, limit=100)).entries}


async def test_filters_hold_together_and_pages_follow_each_other(wire: Any, kept: Any, ask: Any) -> None:
    actor, target = f"k-{uuid4()}", f"t-{uuid4()}"
    await kept(
        *(act(wire.tenant, number, actor=actor) for number in range(5)),
        act(wire.tenant, 5, actor=actor, action="key.rotate"),
        act(wire.tenant, 6, actor=actor, target=target),
    )
    seen, after = [], None
    while True:
        page = await ask(actor=actor, limit=3, after=after)
        seen += [entry.record.occurred_at for entry in page.entries]
        after = page.next_cursor
        if after is None:
            break
    assert seen == [BEGAN + timedelta(seconds=number) for number in reversed(range(7))]
    assert [entry.record.action for entry in (await ask(actor=actor, action="key.rotate")).entries] == ["key.rotate"]
    assert len((await ask(target=target)).entries) == 1
    within = await ask(actor=actor, since=BEGAN + timedelta(seconds=1), until=BEGAN + timedelta(seconds=3))
    assert [entry.record for entry in within.entries] == [act(wire.tenant, number, actor=actor) for number in (2, 1)]


@pytest.mark.parametrize("cursor", ["nonsense", f"{10**17}.e", "1.", ".e"])
async def test_a_cursor_that_never_was_is_refused(wire: Any, cursor: str) -> None:
    asked = AuditInspected(reply_partition=REPLY_PARTITION, after=cursor)
    failed = await wire.ask("audit.inspected", asked, RequestFailed)
    assert (failed.problem.code, failed.problem.param, failed.problem.status) == ("invalid_value", "after", 400)
