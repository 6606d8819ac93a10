"""Generations, as their events tell of them, and what was used."""

from datetime import date, datetime
from typing import Annotated, Literal

from pydantic import Field

from tessera.contracts.events import Capability, FinishReason, UsageSource
from tessera.gateway.domain.records import Status
from tessera.gateway.routes.schemas.common import View

GenerationId = Annotated[str, Field(min_length=1, max_length=256, examples=["019a2b3c-0000-7000-8000-000000000001"])]


class RecordUsageView(View):
    """What a generation used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    source: UsageSource | None
    cost: Annotated[float | None, Field(description="In the operator's currency; null for a model without a price.")]


class FailureView(View):
    """Why a generation failed."""

    code: str
    message: str


class GenerationView(View):
    """One generation, without its content."""

    id: str
    object: Literal["generation"] = "generation"
    status: Status
    model: Annotated[str, Field(description="As the request named it.")]
    served_model: str
    capability: Capability
    stream: bool
    key_id: str | None
    user: str | None
    created_at: datetime
    ended_at: datetime | None
    finish_reason: FinishReason | None
    usage: Annotated[RecordUsageView | None, Field(description="Null while it runs, and where nothing was generated.")]
    error: FailureView | None


class GenerationList(View):
    """One page; go on with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[GenerationView]
    first_id: str | None
    last_id: str | None
    has_more: bool


UsageGroup = Literal["day", "key_id", "model"]


class UsageRowView(View):
    """Sums of one group; what was not grouped by is null. `errors` are generations that failed; a cancelled one is none."""

    day: date | None
    key_id: str | None
    model: str | None
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cost: Annotated[float, Field(description="In the operator's currency; models without a price add nothing.")]
    seconds: Annotated[float, Field(description="From each request to its end, added up.")]


class UsageView(View):
    """What a tenant's generations used."""

    object: Literal["usage"] = "usage"
    tenant_id: str
    since: date
    until: date
    group_by: list[UsageGroup]
    data: list[UsageRowView]


CallGroup = Literal["day", "key_id", "operation"]


class CallRowView(View):
    """Calls of one group; what was not grouped by is null."""

    day: date | None
    key_id: str | None
    operation: str | None
    requests: int
    errors: Annotated[int, Field(description="Those that were answered with 400 or above.")]


class CallsView(View):
    """How many calls a tenant's keys made."""

    object: Literal["usage.calls"] = "usage.calls"
    tenant_id: str
    since: date
    until: date
    group_by: list[CallGroup]
    data: list[CallRowView]
