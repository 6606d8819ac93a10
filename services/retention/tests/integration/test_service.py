"""The service as a process of its own: policies, dry runs and sweeps over Kafka."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from tessera.contracts.events import PolicyInspected, PolicyReported, RequestFailed, SweepCancelled, SweepInspected, SweepReported
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
