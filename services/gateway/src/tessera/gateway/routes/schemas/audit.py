"""The answer of `/v1/audit`."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from tessera.gateway.routes.schemas.common import View


class ActorView(View):
    """Who acted."""

    kind: Annotated[str, Field(description="`key`, `bootstrap`, `operator_key`, or `unknown` for one that no key opened for.")]
    id: Annotated[str | None, Field(description="Id of the key.")]
    tenant_id: Annotated[str | None, Field(description="Whose key it is.")]


class TargetView(View):
    """What was acted upon."""

    kind: str
    id: str


class AuditEventView(View):
    """One record. An act that does not commit in Postgres has two: `attempted`, and what came of it."""

    id: str
    occurred_at: datetime
    action: Annotated[str, Field(description="Such as `key.revoke`.")]
    outcome: Literal["attempted", "succeeded", "refused", "unknown"]
    actor: ActorView
    tenant_id: Annotated[str | None, Field(description="The tenant acted upon; null where it is the platform.")]
    target: TargetView | None
    code: Annotated[str | None, Field(description="Why it was refused, or what is not known.")]
    details: dict[str, str]
    count: Annotated[int, Field(description="How often: refusals of one minute are one record.")]
    client_address: Annotated[str | None, Field(description="null where it is another tenant's and you see only your own records.")]
    request_id: str | None


class AuditPage(View):
    """Records, the newest first."""

    data: list[AuditEventView]
    has_more: bool
    next_cursor: str | None
