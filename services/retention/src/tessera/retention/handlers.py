"""One function per event. The bus commits; nothing here knows Kafka or SQL."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tessera.bus import Emitter, Received
from tessera.contracts.errors import InvalidError, Problem
from tessera.contracts.events import (
    AuditInspected,
    AuditRecorded,
    AuditReported,
    MemoryChanged,
    MemoryRecorded,
    PolicyInspected,
    PolicyReported,
    PolicySubmitted,
    RequestFailed,
    SweepCancelled,
    SweepInspected,
    SweepRequested,
)
from tessera.retention.ports import AuditTrail, PolicyInForce, RetentionUnit, Sweep

_FIRST_PAGE = 100
CANCELLED: Final = Problem(code="sweep_cancelled", message="The sweep was cancelled.", status=409)


async def memory_recorded(event: Received[MemoryRecorded], unit: RetentionUnit) -> None:
    """Keeps the metadata of what memory recorded, never its text."""
    await unit.projection.record(event.tenant_id, event.subject_id, event.data)


async def memory_changed(event: Received[MemoryChanged], unit: RetentionUnit) -> None:
    """Follows a memory's new version and confirms the sweep that asked for it."""
    await unit.projection.change(event.tenant_id, event.data)


async def policy_submitted(event: Received[PolicySubmitted], unit: RetentionUnit) -> None:
    """Sets the tenant's policy; the same policy again changes nothing and keeps its version."""
    known = await unit.policies.in_force(event.tenant_id)
    if known is None or known.policy != event.data.policy:
        known = PolicyInForce(event.data.policy, known.version + 1 if known else 1, event.time)
        await unit.policies.add(event.tenant_id, known)
    await unit.reply(_reported(known))


async def policy_inspected(event: Received[PolicyInspected], unit: RetentionUnit) -> None:
    """Tells the policy in force."""
    await unit.reply(_reported(await unit.policies.in_force(event.tenant_id)))


def _reported(known: PolicyInForce | None) -> PolicyReported:
    if known is None:
        return PolicyReported(policy=None, version=0)
    return PolicyReported(policy=known.policy, version=known.version, updated_at=known.updated_at)


async def sweep_requested(event: Received[SweepRequested], unit: RetentionUnit) -> None:
    """Accepts a sweep, once per id, and tells where it stands; a worker does the rest.

    A sweep that cannot run is kept as failed, so that whoever looks later finds the reason.
    """
    wanted = await _wanted_sweep(event, unit)
    known = await unit.sweeps.find(event.tenant_id, wanted.sweep_id)
    if known is not None and known.wanted != wanted.wanted:
        await _refuse(unit, "sweep_id_reused", "This sweep id was used for another sweep.", 409)
        return
    if known is None:
        await unit.sweeps.add(wanted)
    await _report(unit, event.tenant_id, wanted.sweep_id, None, _FIRST_PAGE)


async def _wanted_sweep(event: Received[SweepRequested], unit: RetentionUnit) -> Sweep:
    sweep = Sweep(
        tenant_id=event.tenant_id,
        sweep_id=event.data.sweep_id,
        dry_run=event.data.dry_run,
        plan_id=event.data.plan_id,
        state="running",
        policy_version=0,
        policy=None,
        as_of=event.time,
        origin=event.origin,
    )
    try:
        return await _by_policy(sweep, unit) if sweep.plan_id is None else await _by_plan(sweep, sweep.plan_id, unit)
    except InvalidError as error:
        return replace(sweep, state="failed", problem=Problem.of(error))


async def _by_policy(sweep: Sweep, unit: RetentionUnit) -> Sweep:
    in_force = await unit.policies.in_force(sweep.tenant_id)
    if in_force is None:
        raise InvalidError("policy_missing", "This tenant has no retention policy; set one before sweeping.")
    return replace(sweep, policy=in_force.policy, policy_version=in_force.version)


async def _by_plan(sweep: Sweep, plan_id: str, unit: RetentionUnit) -> Sweep:
    if sweep.dry_run:
        raise InvalidError("plan_of_dry_run", "A dry run cannot carry out a plan.", "plan_id")
    plan = await unit.sweeps.find(sweep.tenant_id, plan_id)
    if plan is None or not plan.dry_run:
        raise InvalidError("plan_not_found", f"There is no dry run {plan_id!r}.", "plan_id")
    if plan.state != "planned":
        raise InvalidError("plan_not_ready", f"The dry run {plan_id!r} is {plan.state}.", "plan_id")
    return replace(sweep, policy_version=plan.policy_version)


async def sweep_inspected(event: Received[SweepInspected], unit: RetentionUnit) -> None:
    """Tells where a sweep stands, with one page of its items."""
    await _report(unit, event.tenant_id, event.data.sweep_id, event.data.after, event.data.limit)


async def sweep_cancelled(event: Received[SweepCancelled], unit: RetentionUnit) -> None:
    """Ends a sweep that is not over and tells where it stands; one that is over stays as it is."""
    await unit.sweeps.cancel(event.tenant_id, event.data.sweep_id, CANCELLED)
    await _report(unit, event.tenant_id, event.data.sweep_id, None, _FIRST_PAGE)


async def _report(unit: RetentionUnit, tenant_id: str, sweep_id: str, after: str | None, limit: int) -> None:
    report = await unit.sweeps.report(tenant_id, sweep_id, after=after, limit=limit)
    if report is None:
        await _refuse(unit, "sweep_not_found", f"There is no sweep {sweep_id!r}.", 404)
    else:
        await unit.reply(report)


async def _refuse(unit: RetentionUnit, code: str, message: str, status: int) -> None:
    await unit.reply(RequestFailed(problem=Problem(code=code, message=message, param="sweep_id", status=status)))


async def audit_recorded(event: Received[AuditRecorded], unit: RetentionUnit) -> None:
    """Keeps what was done, for ever."""
    await unit.audit.append(event.source, event.id, event.data)


async def audit_inspected(event: Received[AuditInspected], trail: AuditTrail, emit: Emitter) -> None:
    """Tells one page of what was done: to the asker's tenant, or to any where the gateway says that the asker may see all."""
    try:
        page = await trail.page(event.tenant_id, event.data)
    except InvalidError as error:
        await emit.fail(Problem.of(error, status=400))
    else:
        await emit.reply(AuditReported(entries=tuple(page.entries), next_cursor=page.next_cursor))
