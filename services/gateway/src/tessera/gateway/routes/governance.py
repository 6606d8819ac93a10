"""`/v1/retention/…`, `/v1/datasets`, `/v1/validations`."""

from pathlib import PurePath
from typing import Annotated, Final

from fastapi import APIRouter, Body, Path, Query, Request
from starlette.datastructures import UploadFile

from tessera.contracts.events import PolicyReported, RetentionPolicy, SweepReported, ValidationReported
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers import governance
from tessera.gateway.routes.context import DataEngineer, IdempotencyKey, RetentionOfficer
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.common import as_written
from tessera.gateway.routes.schemas.governance import (
    DatasetView,
    PolicyView,
    ResourceView,
    SweepBody,
    SweepView,
    ValidationBody,
    ValidationView,
)

router = APIRouter(route_class=CarefulRoute)

ResourceId = Annotated[str, Path(min_length=1, max_length=128)]

_UPLOAD: Final = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary", "description": "A table named .csv, .parquet or .jsonl."}},
            },
            "examples": {"table.csv": {"summary": "curl -F file=@table.csv", "value": {"file": "a,b\n1,2\n3,4\n5,6\n"}}},
        }
    },
}
_FORMATS: Final = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@router.put("/v1/retention/policy", tags=["retention"])
async def put_policy(
    body: Annotated[RetentionPolicy, as_written(RetentionPolicy), Body(examples=[{"max_age_days": 3650}])], caller: RetentionOfficer
) -> PolicyView:
    """Set your tenant's policy. A time-out (504) does not undo it: ask with GET."""
    async with caller.on_record("policy.set", "policy", caller.tenant_id, tenant_id=caller.tenant_id):
        return _policy_view(await governance.submit_policy(caller.rooms.log, body, caller.call))


@router.get("/v1/retention/policy", tags=["retention"])
async def retrieve_policy(caller: RetentionOfficer) -> PolicyView:
    """Your tenant's policy; none where none was set."""
    return _policy_view(await governance.inspect_policy(caller.rooms.log, caller.call))


@router.post("/v1/retention/sweeps", status_code=202, tags=["retention"])
async def create_sweep(body: SweepBody, caller: RetentionOfficer, idempotency_key: IdempotencyKey = None) -> ResourceView:
    """Plan a sweep (`dry_run`), run one, or run exactly an earlier plan."""
    if body.dry_run and body.plan is not None:
        raise ApiError(400, "invalid_value", "A plan is carried out with 'dry_run': false.", param="plan")
    sweep_id = governance.resource_id(caller.tenant_id, idempotency_key, "sweep")
    dry_run = str(body.dry_run).lower()
    async with caller.on_record("sweep.start", "sweep", sweep_id, tenant_id=caller.tenant_id, dry_run=dry_run, plan=body.plan):
        await governance.request_sweep(caller.rooms.log, sweep_id, dry_run=body.dry_run, plan_id=body.plan, call=caller.call)
    return ResourceView(id=sweep_id, url=f"/v1/retention/sweeps/{sweep_id}")


@router.get("/v1/retention/sweeps/{sweep_id}", tags=["retention"])
async def retrieve_sweep(
    sweep_id: ResourceId,
    caller: RetentionOfficer,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    after: Annotated[str | None, Query(max_length=256, description="next_cursor of the page before.")] = None,
) -> SweepView:
    """A sweep and one page of what it names."""
    return _sweep_view(await governance.inspect_sweep(caller.rooms.log, sweep_id, limit=limit, after=after, call=caller.call))


@router.post("/v1/retention/sweeps/{sweep_id}/cancel", tags=["retention"])
async def cancel_sweep(sweep_id: ResourceId, caller: RetentionOfficer) -> SweepView:
    """End a sweep that is not over; it fails as `sweep_cancelled`. What was asked of memory already is not taken back."""
    async with caller.on_record("sweep.cancel", "sweep", sweep_id, tenant_id=caller.tenant_id):
        return _sweep_view(await governance.cancel_sweep(caller.rooms.log, sweep_id, caller.call))


@router.post("/v1/datasets", status_code=201, tags=["validation"], openapi_extra={"requestBody": _UPLOAD})
async def create_dataset(request: Request, caller: DataEngineer, idempotency_key: IdempotencyKey = None) -> DatasetView:
    """Upload a table to be judged, or to be judged against."""
    # Read here and not by a parameter: FastAPI would take the whole upload before it asks for the key.
    async with request.form(max_files=1, max_fields=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "missing_required_parameter", "Missing required parameter: 'file' (multipart/form-data).", param="file")
        dataset_id = governance.resource_id(caller.tenant_id, idempotency_key, "dataset")
        saved = await caller.rooms.datasets.save(caller.tenant_id, dataset_id, _format(file), file.file)
    return DatasetView(id=saved.dataset_id, format=saved.format, size_bytes=saved.size_bytes, sha256=saved.sha256)


def _format(file: UploadFile) -> str:
    known = _FORMATS.get(PurePath(file.filename or "").suffix.lower())
    if known is None:
        raise ApiError(400, "unsupported_format", "The name of the file must end with .csv, .parquet or .jsonl.", param="file")
    return known


@router.post("/v1/validations", status_code=202, tags=["validation"])
async def create_validation(body: ValidationBody, caller: DataEngineer, idempotency_key: IdempotencyKey = None) -> ResourceView:
    """Have a dataset judged, against a reference where there is one."""
    validation_id = governance.resource_id(caller.tenant_id, idempotency_key, "validation")
    await governance.request_validation(
        caller.rooms.log, caller.rooms.datasets, validation_id, caller.call, candidate=body.dataset, reference=body.reference
    )
    return ResourceView(id=validation_id, url=f"/v1/validations/{validation_id}")


@router.get("/v1/validations/{validation_id}", tags=["validation"])
async def retrieve_validation(validation_id: ResourceId, caller: DataEngineer) -> ValidationView:
    """A validation and, once completed, its verdict with the evidence."""
    return _validation_view(await governance.inspect_validation(caller.rooms.log, validation_id, caller.call))


@router.post("/v1/validations/{validation_id}/cancel", tags=["validation"])
async def cancel_validation(validation_id: ResourceId, caller: DataEngineer) -> ValidationView:
    """End a validation that is not over; it fails as `validation_cancelled`."""
    return _validation_view(await governance.cancel_validation(caller.rooms.log, validation_id, caller.call))


def _policy_view(report: PolicyReported) -> PolicyView:
    return PolicyView.model_validate(report.model_dump(mode="json"))


def _sweep_view(report: SweepReported) -> SweepView:
    fields = report.model_dump(mode="json", exclude={"sweep_id", "state", "items"})
    return SweepView(id=report.sweep_id, status=report.state, data=list(report.items), has_more=report.next_cursor is not None, **fields)


def _validation_view(report: ValidationReported) -> ValidationView:
    fields = report.model_dump(mode="json", exclude={"validation_id", "state"})
    return ValidationView(id=report.validation_id, status=report.state, **fields)
