"""What routes are given: the caller with its rights, and the rooms behind the handlers."""

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from tessera.contracts.events import AuditAction, AuditTarget
from tessera.gateway.domain import audit, errors
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.consistency import Tokens
from tessera.gateway.domain.directories import ModelDirectory, StatusDirectory
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.keys import Principal
from tessera.gateway.domain.limits import Holder, user_of
from tessera.gateway.domain.records import Prices
from tessera.gateway.handlers.access import Authenticator
from tessera.gateway.handlers.auditing import Refusals, on_record
from tessera.gateway.handlers.calls import Calls
from tessera.gateway.handlers.generations import Limits
from tessera.gateway.handlers.handoff import Handoff
from tessera.gateway.handlers.limiting import Gate, Use
from tessera.gateway.ports import (
    Answers,
    AuditTrail,
    Call,
    CallSums,
    Datasets,
    DeadLetters,
    Decisions,
    GenerationRecords,
    Generations,
    Log,
    StoredCompletions,
    Tenants,
)
from tessera.telemetry import bound

TIME_LIMIT_HEADER: Final = "Tessera-Deadline-Seconds"
_SECONDS: Final = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)

_LONGEST: Final = 256
"""Characters of a target's name on record: a client may invent longer ones."""

_scheme = HTTPBearer(
    auto_error=False,
    description="An API key: tsr_<environment>_<id>_<secret>. Or, where an OpenID provider is trusted, one of its access tokens.",
)


@dataclass(frozen=True)
class Rooms:
    """Everything that routes hand to handlers. Built once, in `app`."""

    log: Log
    tenants: Tenants
    datasets: Datasets
    generations: Generations
    stored: StoredCompletions
    records: GenerationRecords
    answers: Answers
    call_sums: CallSums
    calls: Calls
    dead_letters: DeadLetters
    decisions: Decisions
    trail: AuditTrail
    refusals: Refusals
    authenticator: Authenticator
    ready: Callable[[], Awaitable[tuple[bool, str]]]
    """Whether this replica can serve, and the word for it."""
    handoff: Handoff
    tokens: Tokens
    gate: Gate = field(default_factory=Gate)
    models: ModelDirectory = field(default_factory=ModelDirectory)
    statuses: StatusDirectory = field(default_factory=StatusDirectory)
    generation: Limits = field(default_factory=Limits)
    prices: Prices = field(default_factory=Prices)
    patience: timedelta = timedelta(seconds=15)
    """Longest wait for another service's answer to anything but a generation."""
    key_environment: str = "dev"
    instance: str = ""
    """The name of this replica."""


@dataclass(frozen=True)
class Caller:
    """An authenticated request."""

    principal: Principal
    call: Call
    rooms: Rooms
    use: Use = field(default_factory=Use)
    address: str | None = None
    time_limit: timedelta | None = None
    """What the request allows its answer to take, where it says so."""

    @property
    def generation_limits(self) -> Limits:
        """How long a generation may take for this caller."""
        limits = self.rooms.generation
        return limits if self.time_limit is None else replace(limits, timeout=min(limits.timeout, self.time_limit))

    @property
    def tenant_id(self) -> str:
        """Whose data this request may touch."""
        return self.principal.tenant_id

    @property
    def actor(self) -> Actor:
        """Who this is, on record."""
        return Actor("key", self.principal.key_id, self.tenant_id, self.address, self.call.request_id)

    def on_record(
        self, action: AuditAction, kind: str, name: str, *, tenant_id: str | None = None, **details: str | None
    ) -> AbstractAsyncContextManager[None]:
        """Has an act on record that no transaction of ours holds: `attempted` before it, then what came of it."""
        act = audit.record(self.actor, action, tenant_id=tenant_id, target=AuditTarget(kind=kind, id=name[:_LONGEST]), details=details)
        return on_record(self.rooms.trail, act)


def rooms_of(request: Request) -> Rooms:
    """The rooms of the application that serves this request."""
    rooms: Rooms = request.app.state.rooms
    return rooms


@dataclass(frozen=True)
class Require:
    """A dependency: the caller, if its key has `scope`. Deny by default: a route without one is public and has to be listed as such."""

    scope: str

    async def __call__(self, request: Request, _: Annotated[Any, Depends(_scheme)] = None) -> Caller:
        """Raises ApiError 401, 403 or 429."""
        rooms = rooms_of(request)
        request.state.use = use = Use()
        address = request.client.host if request.client is not None else None
        if address is not None:
            await rooms.gate.admit(use, Holder("ip", address))
        principal = await _authenticated(rooms, request.headers.get("authorization"), address)
        if self.scope not in principal.scopes:
            rooms.refusals.unauthorized(Actor("key", principal.key_id, principal.tenant_id, address), self.scope)
            raise errors.missing_scope(self.scope)
        request.state.principal = principal
        use.own = principal.allowance
        await rooms.gate.admit(use, *_holders(principal))
        request.state.around.enter_context(bound(tenant_id=principal.tenant_id))
        limit = _time_limit(request)
        patience = rooms.patience if limit is None else min(rooms.patience, limit)
        return Caller(principal, Call(principal.tenant_id, request.state.request_id, patience), rooms, use, address, limit)


def required_scope(route: APIRoute) -> str | None:
    """The scope that a key needs for this route; None for a public one."""
    return next((dependant.call.scope for dependant in _dependants(route.dependant) if isinstance(dependant.call, Require)), None)


def _dependants(root: Dependant) -> Iterator[Dependant]:
    yield root
    for child in root.dependencies:
        yield from _dependants(child)


def _time_limit(request: Request) -> timedelta | None:
    """Raises ApiError 400 for a header that is there and says nothing."""
    given = request.headers.get(TIME_LIMIT_HEADER)
    if given is None:
        return None
    if not _SECONDS.fullmatch(given) or not (seconds := float(given)):
        raise errors.ApiError(
            400, "invalid_value", f"Invalid '{TIME_LIMIT_HEADER}': expected seconds, such as 2.5.", param=TIME_LIMIT_HEADER
        )
    return timedelta(seconds=seconds)


async def _authenticated(rooms: Rooms, authorization: str | None, address: str | None) -> Principal:
    """Counts for the audit trail who is refused."""
    try:
        return await rooms.authenticator.principal(authorization)
    except ApiError as refused:
        if refused.status == 401:
            key = rooms.authenticator.suspect(authorization)
            by = Actor("unknown", key.id, key.tenant_id, address) if key else Actor("unknown", client_address=address)
            rooms.refusals.unauthenticated(by, refused.code)
        raise


def _holders(principal: Principal) -> list[Holder]:
    """A credential that says who its user is counts for that user, whatever a body says."""
    known = [Holder("key", principal.key_id), Holder("tenant", principal.tenant_id)]
    return known if principal.user is None else [*known, user_of(principal.tenant_id, principal.user)]


Inference = Annotated[Caller, Depends(Require("inference"))]
MemoryReader = Annotated[Caller, Depends(Require("memory:read"))]
MemoryWriter = Annotated[Caller, Depends(Require("memory:write"))]
RetentionOfficer = Annotated[Caller, Depends(Require("retention"))]
DataEngineer = Annotated[Caller, Depends(Require("validation"))]
Accountant = Annotated[Caller, Depends(Require("usage"))]
Operator = Annotated[Caller, Depends(Require("admin"))]
Auditor = Annotated[Caller, Depends(Require("audit"))]

IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=255, description="The same key gives the same ids: a repeat changes nothing."),
]
