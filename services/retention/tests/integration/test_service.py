"""The service as a process of its own: policies, dry runs, sweeps and the audit trail over Kafka."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tessera.contracts.events import (
    AuditActor,
    AuditInspected,
    AuditRecorded,
    AuditReported,
    AuditTarget,
    PolicyInspected,
    PolicyReported,
    RequestFailed,
    SweepCancelled,
    SweepInspected,
    SweepReported,
)
from tessera.storage import Database
from tessera.storage.connections import owner_engine
from tessera.testkit.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("service")]

OLD = timedelta(days=40)
YOUNG = timedelta(days=1)
REPLY_PARTITION = 3


async def test_a_policy_is_set_versioned_and_told(wire: Any) -> None:
    assert (await wire.submit(max_age_days=30)).version == 1
    assert (await wire.submit(max_age_days=30)).version == 1
    changed = await wire.submit(max_age_days=7, importance_threshold=0.2, kinds=("message",))
    told = await wire.ask("policy.requested", PolicyInspected(reply_partition=REPLY_PARTITION), PolicyReported)
    assert changed.version == 2
    assert told == changed


async def test_a_tenant_without_a_policy_is_told_so(wire: Any) -> None:
    told = await wire.ask("policy.requested", PolicyInspected(reply_partition=REPLY_PARTITION), PolicyReported)
    assert (told.policy, told.version) == (None, 0)


async def test_the_projection_keeps_metadata_and_no_text(wire: Any, known: Any) -> None:
    memory_id = await wire.record(age=OLD, importance=0.4, kind="chunk")
    row = (await known(1))[memory_id]
    assert (row.kind, row.importance, row.version, row.archived) == ("chunk", 0.4, 1, False)
    assert not any("nobody but memory" in str(value) for value in row)


async def test_a_dry_run_names_what_is_due_and_why_and_changes_nothing(wire: Any, known: Any) -> None:
    await wire.submit(max_age_days=30, importance_threshold=0.2)
    old, dull = await wire.record(age=OLD), await wire.record(age=YOUNG, importance=0.1)
    await wire.record(age=YOUNG)
    before = await known(3)
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=True)
    report = await wire.ended(sweep_id)
    assert {item.memory_id: item.rule for item in report.items} == {old: "max_age", dull: "importance_threshold"}
    assert (report.state, report.planned, report.archived, report.dry_run) == ("planned", 2, 0, True)
    assert await known(3) == before
    assert not [event for event in wire.archive.seen if event.data["sweep_id"] == sweep_id]


async def test_a_sweep_of_a_plan_archives_exactly_what_the_plan_named(wire: Any, known: Any, archived: Any) -> None:
    await wire.submit(max_age_days=30)
    planned = {await wire.record(age=OLD) for _ in range(3)}
    await known(3)
    plan_id, sweep_id = str(uuid4()), str(uuid4())
    await wire.sweep(plan_id, dry_run=True)
    await wire.ended(plan_id)
    await wire.record(age=OLD)  # due as well, but nobody saw it in the plan
    await known(4)
    await wire.sweep(sweep_id, dry_run=False, plan_id=plan_id)
    assert set(await wire.obey(sweep_id, 3)) == planned
    report = await wire.ended(sweep_id)
    assert (report.state, report.planned, report.archived, report.skipped) == ("completed", 3, 3, 0)
    assert await archived() == planned


async def test_what_changed_since_it_was_planned_is_skipped(wire: Any, known: Any, archived: Any) -> None:
    await wire.submit(max_age_days=30)
    kept, gone, refused = [await wire.record(age=OLD) for _ in range(3)]
    await known(3)
    plan_id, sweep_id = str(uuid4()), str(uuid4())
    await wire.sweep(plan_id, dry_run=True)
    await wire.ended(plan_id)
    await wire.change(gone, "archived", 2)
    await eventually(archived)
    await wire.sweep(sweep_id, dry_run=False, plan_id=plan_id)
    await wire.asked(sweep_id, 2)
    await wire.change(kept, "archived", 2, sweep_id)
    await wire.change(refused, "archive_skipped", 5, sweep_id)
    report = await wire.ended(sweep_id)
    assert {item.memory_id: item.state for item in report.items} == {kept: "archived", gone: "skipped", refused: "skipped"}
    assert report.state == "completed"


async def test_a_sweep_that_waits_for_memory_is_cancelled_and_late_answers_change_nothing(wire: Any, known: Any) -> None:
    await wire.submit(max_age_days=30)
    memory_id = await wire.record(age=OLD)
    await known(1)
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=False)
    await wire.asked(sweep_id, 1)
    cancelled = SweepCancelled(reply_partition=REPLY_PARTITION, sweep_id=sweep_id)
    told = await wire.ask("sweep.requested", cancelled, SweepReported, key=wire.sweep_key(sweep_id))
    assert (told.state, told.problem.code) == ("failed", "sweep_cancelled")
    await wire.change(memory_id, "archived", 2, sweep_id)
    again = await wire.ask("sweep.requested", cancelled, SweepReported, key=wire.sweep_key(sweep_id))
    assert (again.state, again.finished_at) == ("failed", told.finished_at)


async def test_many_items_go_in_chunks_and_come_back_in_pages(wire: Any, known: Any) -> None:
    await wire.submit(importance_threshold=1.0)
    for _ in range(450):
        await wire.record(age=YOUNG)
    await known(450)
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=False)
    requests = await wire.asked(sweep_id, 450)
    assert sorted(len(event.data["items"]) for event in requests) == [50, 200, 200]
    pages, after = [], None
    while True:
        page = await wire.inspect(sweep_id, limit=200, after=after)
        pages.append([item.memory_id for item in page.items])
        if (after := page.next_cursor) is None:
            break
    assert [len(page) for page in pages] == [200, 200, 50]
    assert sorted(memory_id for page in pages for memory_id in page) == sorted(wire.recorded)


async def test_the_same_sweep_again_changes_nothing(wire: Any, known: Any) -> None:
    await wire.submit(max_age_days=30)
    await wire.record(age=OLD)
    await known(1)
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=False)
    await wire.obey(sweep_id, 1)
    first = await wire.ended(sweep_id)
    assert await wire.sweep(sweep_id, dry_run=False) == first
    assert (await wire.refused_sweep(sweep_id, dry_run=True)).problem.code == "sweep_id_reused"
    assert len(await wire.asked(sweep_id, 1)) == 1


async def test_a_sweep_without_a_policy_fails_with_its_reason(wire: Any) -> None:
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=True)
    report = await wire.ended(sweep_id)
    assert (report.state, report.problem.code) == ("failed", "policy_missing")


@pytest.mark.parametrize(("dry_run", "code"), [(False, "plan_not_found"), (True, "plan_of_dry_run")])
async def test_a_sweep_of_a_plan_that_cannot_be_carried_out_fails(wire: Any, dry_run: bool, code: str) -> None:
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=dry_run, plan_id="nowhere")
    assert (await wire.ended(sweep_id)).problem.code == code


async def test_another_tenant_sees_neither_the_sweep_nor_the_policy(wire: Any) -> None:
    await wire.submit(max_age_days=30)
    sweep_id = str(uuid4())
    await wire.sweep(sweep_id, dry_run=True)
    asked = SweepInspected(reply_partition=REPLY_PARTITION, sweep_id=sweep_id)
    refused = await wire.ask("sweep.requested", asked, RequestFailed, tenant="stranger")
    told = await wire.ask("policy.requested", PolicyInspected(reply_partition=REPLY_PARTITION), PolicyReported, tenant="stranger")
    assert (refused.problem.code, refused.problem.status, told.policy) == ("sweep_not_found", 404, None)


# --- the audit trail: kept once, never changed, and told to whom it belongs ---

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
