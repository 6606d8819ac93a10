"""One function per event. The bus commits; nothing here knows Kafka or SQL."""

from __future__ import annotations

from typing import Final

from tessera.bus import Received
from tessera.contracts.errors import Problem
from tessera.contracts.events import RequestFailed, ValidationCancelled, ValidationInspected, ValidationRequested
from tessera.validator.ports import Job, ValidationUnit

CANCELLED: Final = Problem(code="validation_cancelled", message="The validation was cancelled.", status=409)


async def validation_requested(event: Received[ValidationRequested], unit: ValidationUnit) -> None:
    """Accepts a validation, once per id, and tells where it stands; a worker does the rest."""
    job = Job(event.tenant_id, event.data.validation_id, event.data.candidate, event.data.reference, event.origin)
    if await unit.add(job, event.time):
        await _report(unit, event.tenant_id, event.data.validation_id)
    else:
        await _refuse(unit, "validation_id_reused", "This validation id was used for other datasets.", 409)


async def validation_inspected(event: Received[ValidationInspected], unit: ValidationUnit) -> None:
    """Tells where a validation stands, with its report once there is one."""
    await _report(unit, event.tenant_id, event.data.validation_id)


async def validation_cancelled(event: Received[ValidationCancelled], unit: ValidationUnit) -> None:
    """Ends a validation that is not over and tells where it stands; one that is over stays as it is."""
    await unit.cancel(event.tenant_id, event.data.validation_id, CANCELLED)
    await _report(unit, event.tenant_id, event.data.validation_id)


async def _report(unit: ValidationUnit, tenant_id: str, validation_id: str) -> None:
    report = await unit.report(tenant_id, validation_id)
    if report is None:
        await _refuse(unit, "validation_not_found", f"There is no validation {validation_id!r}.", 404)
    else:
        await unit.reply(report)


async def _refuse(unit: ValidationUnit, code: str, message: str, status: int) -> None:
    await unit.reply(RequestFailed(problem=Problem(code=code, message=message, param="validation_id", status=status)))
