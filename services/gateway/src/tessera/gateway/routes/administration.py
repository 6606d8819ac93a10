"""`/v1/tenants`, `/v1/keys`, `/v1/services`, `/v1/status`, `/health`."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal, TypeVar

from fastapi import APIRouter, Body, Path, Query, Request, Response

from tessera.contracts.base import TenantId
from tessera.contracts.events import AuditAction, ServiceControlled
from tessera.gateway.domain.backlog import Waiting
from tessera.gateway.domain.directories import Replica, ServiceOverview, serving
from tessera.gateway.domain.limits import MILLIONTHS, UNLIMITED, Allowance
from tessera.gateway.handlers import access, services
from tessera.gateway.handlers.handoff import SpoolState, record_name
from tessera.gateway.ports import KeyDescription, Tenant
from tessera.gateway.routes.context import Caller, Operator, rooms_of
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.administration import (
    ControlBody,
    ControlView,
    HealthView,
    KeyBody,
    KeyPage,
    KeyView,
    NewKeyView,
    ReplayBody,
    ReplayedView,
    ReplayView,
    ReplicaView,
    RotationBody,
    ServiceView,
    SpooledView,
    SpoolPage,
    SpoolView,
    StatusView,
    TenantBody,
    TenantPage,
    TenantView,
)

_CONTROL: Final[dict[str, AuditAction]] = {"pause": "consumer.pause", "resume": "consumer.resume", "reload": "service.reload"}
_PARKED: Final[dict[str, AuditAction]] = {"retry": "parked_event.retry", "discard": "parked_event.discard"}

router = APIRouter(route_class=CarefulRoute, tags=["administration"])

Row = TypeVar("Row", Tenant, KeyDescription)
Limit = Annotated[int, Query(ge=1, le=200)]
After = Annotated[str | None, Query(max_length=128, description="next_cursor of the page before.")]


@router.post("/v1/tenants", status_code=201)
async def create_tenant(body: TenantBody, caller: Operator) -> TenantView:
    """Make a tenant: its topics, its row and the event that tells the other services."""
    return _tenant_view(await access.create_tenant(caller.rooms.tenants, body.id, body.name or body.id, caller.actor))


@router.get("/v1/tenants")
async def list_tenants(caller: Operator, limit: Limit = 50, after: After = None) -> TenantPage:
    """Tenants by id."""
    rows, has_more = _page(await caller.rooms.tenants.list(after=after, limit=limit + 1), limit)
    return TenantPage(data=[_tenant_view(row) for row in rows], has_more=has_more, next_cursor=rows[-1].id if has_more else None)


@router.post("/v1/keys", status_code=201)
async def create_key(body: KeyBody, caller: Operator) -> NewKeyView:
    """Make a key. Its text is in this answer and nowhere else."""
    description, key = await access.create_key(
        caller.rooms.tenants,
        caller.rooms.authenticator,
        caller.actor,
        tenant_id=body.tenant_id or caller.tenant_id,
        name=body.name,
        environment=caller.rooms.key_environment,
        scopes=tuple(dict.fromkeys(body.scopes)),
        expires_at=body.expires_at,
        allowance=body.limits.allowance if body.limits else UNLIMITED,
        on_disconnect=body.on_disconnect,
    )
    return NewKeyView(key=key.reveal(), **_key_fields(description))


@router.get("/v1/keys")
async def list_keys(
    caller: Operator,
    tenant_id: Annotated[TenantId | None, Query(description="Whose keys; your own tenant's where absent.")] = None,
    limit: Limit = 50,
    after: After = None,
) -> KeyPage:
    """A tenant's keys by id, revoked ones included."""
    rows, has_more = _page(await caller.rooms.tenants.list_keys(tenant_id or caller.tenant_id, after=after, limit=limit + 1), limit)
    return KeyPage(data=[KeyView(**_key_fields(row)) for row in rows], has_more=has_more, next_cursor=rows[-1].id if has_more else None)


@router.post("/v1/keys/{key_id}/rotate")
async def rotate_key(
    key_id: Annotated[str, Path(min_length=1, max_length=64)],
    caller: Operator,
    body: Annotated[RotationBody | None, Body(examples=[{"grace_seconds": 3600}])] = None,
) -> NewKeyView:
    """Give a key another secret. The one it had opens it for a while longer, unless the key is rotated again."""
    grace = timedelta(seconds=(body or RotationBody()).grace_seconds)
    description, key = await access.rotate_key(caller.rooms.tenants, caller.rooms.authenticator, caller.actor, key_id, grace)
    return NewKeyView(key=key.reveal(), **_key_fields(description))


@router.delete("/v1/keys/{key_id}", status_code=204)
async def revoke_key(key_id: Annotated[str, Path(min_length=1, max_length=64)], caller: Operator) -> Response:
    """Revoke a key: it opens nothing any more on this replica now, on every other within five seconds."""
    await access.revoke_key(caller.rooms.tenants, caller.rooms.authenticator, caller.actor, key_id)
    return Response(status_code=204)


@router.get("/v1/status")
async def retrieve_status(caller: Operator) -> StatusView:
    """Each service with its replicas, their dependencies and lag."""
    now = datetime.now(UTC)
    found = caller.rooms.statuses.overview(now)
    return StatusView(
        status=_overall(found),
        checked_at=now.isoformat().replace("+00:00", "Z"),
        models=len(caller.rooms.models.known()),
        services=[_service_view(service) for service in found],
        spool=_spool_view(caller.rooms.handoff.state),
    )


@router.get("/v1/spool")
async def list_spool(caller: Operator, limit: Limit = 50, after: After = None) -> SpoolPage:
    """What waits on this replica's disk because Kafka did not take it."""
    handoff = caller.rooms.handoff
    found = handoff.waiting(after=after, limit=limit + 1)
    shown, has_more = found[:limit], len(found) > limit
    return SpoolPage(
        instance=caller.rooms.instance,
        spool=_spool_view(handoff.state),
        data=[_spooled_view(waiting, handoff.expires_at(waiting)) for waiting in shown],
        has_more=has_more,
        next_cursor=record_name(shown[-1]) if has_more else None,
    )


@router.post("/v1/spool/replay")
async def replay_spool(body: ReplayBody, caller: Operator) -> ReplayView:
    """Send spooled events now instead of at the next attempt, each after what is before it in its key."""
    async with caller.on_record("spool.replay", "spool", caller.rooms.instance, events=str(len(body.event_ids))):
        found = await caller.rooms.handoff.replay(body.event_ids, caller.call.patience)
    return ReplayView(data=[ReplayedView(event_id=event_id, status=status) for event_id, status in found.items()])


@router.post("/v1/services/{service}/control", status_code=202)
async def control_service(service: Annotated[str, Path(min_length=1, max_length=64)], body: ControlBody, caller: Operator) -> ControlView:
    """Pause or resume a consumer, decide about a stuck event, or have settings read again. `/v1/status` shows when replicas have obeyed."""
    command = ServiceControlled(service=service, **body.model_dump())
    async with _on_record(caller, command):
        await services.control(caller.rooms.log, command, caller.call)
    return ControlView(status="accepted", **command.model_dump())


def _on_record(caller: Caller, command: ServiceControlled) -> AbstractAsyncContextManager[None]:
    if (parked := command.parked) is not None:
        event = f"{parked.topic}:{parked.partition}:{parked.offset}"
        return caller.on_record(_PARKED[parked.outcome], "parked_event", event, service=command.service)
    return caller.on_record(_CONTROL[command.action], "service", command.service, consumer=command.consumer, instance=command.instance)


@router.get("/health", responses={503: {"model": HealthView}})
async def health(request: Request, response: Response) -> HealthView:
    """Whether this gateway can serve. Public: it names no dependency."""
    ready, word = await rooms_of(request).ready()
    response.status_code = 200 if ready else 503
    return HealthView(status=word)


def _page(rows: Sequence[Row], limit: int) -> tuple[Sequence[Row], bool]:
    return rows[:limit], len(rows) > limit


def _tenant_view(tenant: Tenant) -> TenantView:
    return TenantView.model_validate({"id": tenant.id, "name": tenant.name, "status": tenant.state, "created_at": tenant.created_at})


def _key_fields(key: KeyDescription) -> dict[str, object]:
    return {
        "id": key.id,
        "tenant_id": key.tenant_id,
        "name": key.name,
        "environment": key.environment,
        "scopes": list(key.scopes),
        "status": _key_status(key, datetime.now(UTC)),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "former_until": key.former_until,
        "last_used_at": key.last_used_at,
        "limits": _limits(key.allowance),
        "on_disconnect": key.on_disconnect,
    }


def _limits(allowance: Allowance) -> dict[str, object]:
    spend = allowance.spend_per_day
    return {**vars(allowance), "spend_per_day": None if spend is None else spend / MILLIONTHS}


def _key_status(key: KeyDescription, now: datetime) -> Literal["active", "expired", "revoked"]:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "active"


def _overall(services: list[ServiceOverview]) -> Literal["ok", "degraded", "unavailable"]:
    if not serving(services):
        return "unavailable"
    replicas = (replica.state for service in services for replica in service.replicas)
    return "ok" if all(state == "ready" for state in replicas) else "degraded"


def _spool_view(state: SpoolState) -> SpoolView:
    return SpoolView(enabled=state.enabled, records=state.records, bytes=state.size_bytes, oldest_accepted_at=state.oldest, full=state.full)


def _spooled_view(waiting: Waiting, expires_at: datetime) -> SpooledView:
    return SpooledView(
        event_id=waiting.event_id,
        tenant_id=waiting.tenant_id,
        type=waiting.event_type,
        bytes=waiting.place.length,
        accepted_at=waiting.accepted_at,
        expires_at=expires_at,
        attempts=waiting.attempts,
        last_error=waiting.last_error,
    )


def _service_view(service: ServiceOverview) -> ServiceView:
    return ServiceView(
        service=service.service, status=service.state, lag=service.lag, replicas=[_replica_view(replica) for replica in service.replicas]
    )


def _replica_view(replica: Replica) -> ReplicaView:
    fields = replica.status.model_dump(mode="json", exclude={"service", "state"})
    return ReplicaView(status=replica.state, **fields)
