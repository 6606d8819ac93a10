"""Retention and validation: commands that must happen are published and answered at once; their state is asked for."""

from tessera.contracts import aggregate_key, derived_id, uuid7
from tessera.contracts.events import (
    DatasetReference,
    PolicyInspected,
    PolicyReported,
    PolicySubmitted,
    RetentionPolicy,
    SweepCancelled,
    SweepInspected,
    SweepReported,
    SweepRequested,
    ValidationCancelled,
    ValidationInspected,
    ValidationReported,
    ValidationRequested,
)
from tessera.gateway.domain import errors
from tessera.gateway.handlers.answering import expect
from tessera.gateway.ports import Call, Datasets, Log


def resource_id(tenant_id: str, idempotency_key: str | None, kind: str) -> str:
    """The id of a sweep, validation or dataset: the same for the same Idempotency-Key."""
    if idempotency_key is None:
        return str(uuid7())
    return str(derived_id(f"{tenant_id}\x00{idempotency_key}", kind))


async def submit_policy(log: Log, policy: RetentionPolicy, call: Call) -> PolicyReported:
    """The policy in force from now on."""
    asked = PolicySubmitted(reply_partition=log.reply_partition, policy=policy)
    return expect(PolicyReported, await log.ask(asked, call, key=_policy_key(call)))


async def inspect_policy(log: Log, call: Call) -> PolicyReported:
    """The policy in force."""
    asked = PolicyInspected(reply_partition=log.reply_partition)
    return expect(PolicyReported, await log.ask(asked, call, key=_policy_key(call)))


async def request_sweep(log: Log, sweep_id: str, *, dry_run: bool, plan_id: str | None, call: Call) -> None:
    """Publishes the command; it happens also if nobody asks after it."""
    command = SweepRequested(reply_partition=log.reply_partition, sweep_id=sweep_id, dry_run=dry_run, plan_id=plan_id)
    await log.publish(command, call, event_id=str(derived_id(sweep_id, "requested")), key=_key(call, "sweep", sweep_id))


async def inspect_sweep(log: Log, sweep_id: str, *, limit: int, after: str | None, call: Call) -> SweepReported:
    """A sweep and one page of what it names. Raises ApiError 404 for one that is not this tenant's."""
    asked = SweepInspected(reply_partition=log.reply_partition, sweep_id=sweep_id, limit=limit, after=after)
    return expect(SweepReported, await log.ask(asked, call, key=_key(call, "sweep", sweep_id)))


async def cancel_sweep(log: Log, sweep_id: str, call: Call) -> SweepReported:
    """Where the sweep stands once it is cancelled, or was over before. Raises ApiError 404 for one that is not this tenant's."""
    asked = SweepCancelled(reply_partition=log.reply_partition, sweep_id=sweep_id)
    return expect(SweepReported, await log.ask(asked, call, key=_key(call, "sweep", sweep_id)))


async def request_validation(
    log: Log, datasets: Datasets, validation_id: str, call: Call, *, candidate: str, reference: str | None
) -> None:
    """Publishes the command. Raises ApiError 404 for a dataset that is not this tenant's."""
    command = ValidationRequested(
        reply_partition=log.reply_partition,
        validation_id=validation_id,
        candidate=await _dataset(datasets, call, candidate, "dataset"),
        reference=None if reference is None else await _dataset(datasets, call, reference, "reference"),
    )
    await log.publish(command, call, event_id=str(derived_id(validation_id, "requested")), key=_key(call, "validation", validation_id))


async def inspect_validation(log: Log, validation_id: str, call: Call) -> ValidationReported:
    """A validation and, once completed, its report. Raises ApiError 404 for one that is not this tenant's."""
    asked = ValidationInspected(reply_partition=log.reply_partition, validation_id=validation_id)
    return expect(ValidationReported, await log.ask(asked, call, key=_key(call, "validation", validation_id)))


async def cancel_validation(log: Log, validation_id: str, call: Call) -> ValidationReported:
    """Where the validation stands once it is cancelled, or was over before. Raises ApiError 404 for one that is not this tenant's."""
    asked = ValidationCancelled(reply_partition=log.reply_partition, validation_id=validation_id)
    return expect(ValidationReported, await log.ask(asked, call, key=_key(call, "validation", validation_id)))


async def _dataset(datasets: Datasets, call: Call, dataset_id: str, param: str) -> DatasetReference:
    found = await datasets.find(call.tenant_id, dataset_id)
    if found is None:
        raise errors.ApiError(404, "dataset_not_found", f"The dataset '{dataset_id}' does not exist.", param=param)
    return found


def _policy_key(call: Call) -> bytes:
    return _key(call, "policy", "")


def _key(call: Call, kind: str, name: str) -> bytes:
    return aggregate_key(call.tenant_id, kind, name)
