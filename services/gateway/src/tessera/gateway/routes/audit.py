"""`/v1/audit`: who did what."""

from typing import Annotated

from fastapi import APIRouter, Query

from tessera.contracts.base import TenantId
from tessera.contracts.events import MAXIMUM_AUDIT_PAGE, AuditAction, AuditEntry, AuditInspected
from tessera.gateway.domain.errors import missing_scope
from tessera.gateway.handlers import auditing
from tessera.gateway.routes.context import Auditor, Caller
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.audit import ActorView, AuditEventView, AuditPage, TargetView
from tessera.gateway.routes.schemas.common import Instant

router = APIRouter(route_class=CarefulRoute, tags=["administration"])


@router.get("/v1/audit")
async def list_audit_events(
    caller: Auditor,
    *,
    actor: Annotated[str | None, Query(min_length=1, max_length=128, description="Id of the key that acted.")] = None,
    action: Annotated[AuditAction | None, Query()] = None,
    target: Annotated[str | None, Query(min_length=1, max_length=256, description="Id of what was acted upon.")] = None,
    tenant_id: Annotated[
        TenantId | None, Query(description="The tenant acted upon; another than your own needs the scope `admin`.")
    ] = None,
    since: Annotated[Instant | None, Query(description="At or after.")] = None,
    until: Annotated[Instant | None, Query(description="Before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAXIMUM_AUDIT_PAGE)] = 50,
    after: Annotated[str | None, Query(min_length=1, max_length=256, description="next_cursor of the page before.")] = None,
) -> AuditPage:
    """Administrative acts and refusals, the newest first: your tenant's; with the scope `admin` as well, everybody's."""
    question = AuditInspected(
        reply_partition=caller.rooms.log.reply_partition,
        whole_platform=_sees_all(caller),
        tenant=_tenant(caller, tenant_id),
        actor=actor,
        action=action,
        target=target,
        since=since,
        until=until,
        limit=limit,
        after=after,
    )
    page = await auditing.inspect(caller.rooms.log, question, caller.call)
    data = [_view(entry, caller) for entry in page.entries]
    return AuditPage(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)


def _sees_all(caller: Caller) -> bool:
    return "admin" in caller.principal.scopes


def _tenant(caller: Caller, wanted: str | None) -> str | None:
    """Raises ApiError 403 for another tenant's records."""
    if wanted not in (None, caller.tenant_id) and not _sees_all(caller):
        raise missing_scope("admin")
    return wanted


def _view(entry: AuditEntry, caller: Caller) -> AuditEventView:
    known = entry.record
    mine = _sees_all(caller) or known.actor.tenant == caller.tenant_id
    return AuditEventView(
        id=entry.id,
        occurred_at=known.occurred_at,
        action=known.action,
        outcome=known.outcome,
        actor=ActorView(kind=known.actor.kind, id=known.actor.id, tenant_id=known.actor.tenant),
        tenant_id=known.tenant,
        target=TargetView(kind=known.target.kind, id=known.target.id) if known.target else None,
        code=known.code,
        details={detail.name: detail.value for detail in known.details},
        count=known.count,
        client_address=known.client_address if mine else None,
        request_id=known.request_id,
    )
