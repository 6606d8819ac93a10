"""`/v1/usage`: what was used, by day, key and model."""

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Final, TypeVar

from fastapi import APIRouter, Query
from pydantic import BeforeValidator

from tessera.contracts.base import TenantId
from tessera.gateway.domain.calls import CallRow
from tessera.gateway.domain.errors import ApiError, missing_scope
from tessera.gateway.domain.records import UsageRow
from tessera.gateway.ports import CallQuestion, UsageQuestion
from tessera.gateway.routes.context import Accountant, Caller
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.records import CallGroup, CallRowView, CallsView, UsageGroup, UsageRowView, UsageView

Row = TypeVar("Row")

router = APIRouter(route_class=CarefulRoute, tags=["administration"])

_MONTH: Final = timedelta(days=30)
_MOST_ROWS: Final = 10_000
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_CALL_COLUMN: Final[dict[CallGroup, str]] = {"day": "day", "key_id": "credential_id", "operation": "operation"}
_COLUMN: Final = {"day": "day", "key_id": "credential_id", "model": "model_id"}


def _written(value: object) -> object:
    """As RFC 3339 has it: pydantic would also take a number for seconds since 1970."""
    if isinstance(value, str) and not _DAY.fullmatch(value):
        raise ValueError("expected a day such as 2026-01-31")
    return value


Day = Annotated[date, BeforeValidator(_written), Query(examples=["2026-01-31"])]


@router.get("/v1/usage")
async def usage(
    caller: Accountant,
    *,
    since: Day | None = None,
    until: Day | None = None,
    group_by: Annotated[list[UsageGroup], Query(max_length=3, description="Any of day, key_id and model.")] = ["day"],  # noqa: B006  (FastAPI copies it)
    model: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    key_id: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    tenant_id: Annotated[TenantId | None, Query(description="Your own tenant where absent; another's needs the scope admin.")] = None,
) -> UsageView:
    """Sums over the generations that ended, each once, by the day (UTC) of their request; of the last 30 days where nothing is said."""
    first, last = _days(since, until)
    groups = tuple(column for name, column in _COLUMN.items() if name in group_by)
    question = UsageQuestion(first, last, groups, _MOST_ROWS + 1, model, key_id)
    rows = _few(await caller.rooms.records.usage(_tenant(caller, tenant_id), question))
    named = [name for name in _COLUMN if name in group_by]
    return UsageView(tenant_id=tenant_id or caller.tenant_id, since=first, until=last, group_by=named, data=[_view(row) for row in rows])


@router.get("/v1/usage/calls")
async def usage_of_calls(
    caller: Accountant,
    *,
    since: Day | None = None,
    until: Day | None = None,
    group_by: Annotated[list[CallGroup], Query(max_length=3, description="Any of day, key_id and operation.")] = ["day"],  # noqa: B006  (FastAPI copies it)
    operation: Annotated[str | None, Query(min_length=1, max_length=256, examples=["POST /v1/memories/search"])] = None,
    key_id: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    tenant_id: Annotated[TenantId | None, Query(description="Your own tenant where absent; another's needs the scope admin.")] = None,
) -> CallsView:
    """How many calls there were and how many failed, by the day (UTC); of the last 30 days where nothing is said. To five seconds."""
    first, last = _days(since, until)
    groups = tuple(column for name, column in _CALL_COLUMN.items() if name in group_by)
    question = CallQuestion(first, last, groups, _MOST_ROWS + 1, operation, key_id)
    rows = _few(await caller.rooms.call_sums.sums(_tenant(caller, tenant_id), question))
    data = [_call_view(row) for row in rows]
    named = [name for name in _CALL_COLUMN if name in group_by]
    return CallsView(tenant_id=tenant_id or caller.tenant_id, since=first, until=last, group_by=named, data=data)


def _days(since: date | None, until: date | None) -> tuple[date, date]:
    """Raises ApiError 400 where they end before they begin."""
    last = until or datetime.now(UTC).date()
    first = since or _earlier(last)
    if first > last:
        raise ApiError(400, "invalid_value", "Invalid 'since': expected a day that is not after 'until'.", param="since")
    return first, last


def _few(rows: Sequence[Row]) -> Sequence[Row]:
    """Raises ApiError 400 where there are more than one answer should hold."""
    if len(rows) > _MOST_ROWS:
        raise ApiError(400, "answer_too_large", f"More than {_MOST_ROWS} rows: ask for fewer days or groups.", param="group_by")
    return rows


def _earlier(last: date) -> date:
    """A month before, or the first day that there is."""
    return last - _MONTH if last - date.min >= _MONTH else date.min


def _tenant(caller: Caller, wanted: str | None) -> str:
    """Raises ApiError 403."""
    if wanted not in (None, caller.tenant_id) and "admin" not in caller.principal.scopes:
        raise missing_scope("admin")
    return wanted or caller.tenant_id


def _view(row: UsageRow) -> UsageRowView:
    return UsageRowView(
        day=row.day,
        key_id=row.credential_id,
        model=row.model_id,
        requests=row.requests,
        errors=row.errors,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        total_tokens=row.prompt_tokens + row.completion_tokens,
        cost=float(row.cost),
        seconds=row.milliseconds / 1000,
    )


def _call_view(row: CallRow) -> CallRowView:
    return CallRowView(day=row.day, key_id=row.credential_id, operation=row.operation, requests=row.requests, errors=row.errors)
