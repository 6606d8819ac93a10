"""What routes are given: the caller with its rights, and the rooms behind the handlers."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.security import HTTPBearer

from tessera.gateway.domain import errors
from tessera.gateway.domain.consistency import Tokens
from tessera.gateway.domain.directories import ModelDirectory, StatusDirectory
from tessera.gateway.domain.keys import Principal
from tessera.gateway.domain.limits import Holder, user_of
from tessera.gateway.handlers.access import Authenticator
from tessera.gateway.handlers.generations import Limits
from tessera.gateway.handlers.handoff import Handoff
from tessera.gateway.handlers.limiting import Gate, Use
from tessera.gateway.ports import Call, Datasets, DeadLetters, Decisions, Generations, Log, StoredCompletions, Tenants
from tessera.telemetry import bound

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
    dead_letters: DeadLetters
    decisions: Decisions
    authenticator: Authenticator
    ready: Callable[[], Awaitable[tuple[bool, str]]]
    """Whether this replica can serve, and the word for it."""
    handoff: Handoff
    tokens: Tokens
    gate: Gate = field(default_factory=Gate)
    models: ModelDirectory = field(default_factory=ModelDirectory)
    statuses: StatusDirectory = field(default_factory=StatusDirectory)
    generation: Limits = field(default_factory=Limits)
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

    @property
    def tenant_id(self) -> str:
        """Whose data this request may touch."""
        return self.principal.tenant_id


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
        if request.client is not None:
            await rooms.gate.admit(use, Holder("ip", request.client.host))
        principal = await rooms.authenticator.principal(request.headers.get("authorization"))
        if self.scope not in principal.scopes:
            raise errors.missing_scope(self.scope)
        request.state.principal = principal
        use.own = principal.allowance
        await rooms.gate.admit(use, *_holders(principal))
        request.state.around.enter_context(bound(tenant_id=principal.tenant_id))
        return Caller(principal, Call(principal.tenant_id, request.state.request_id, rooms.patience), rooms, use)


def _holders(principal: Principal) -> list[Holder]:
    """A credential that says who its user is counts for that user, whatever a body says."""
    known = [Holder("key", principal.key_id), Holder("tenant", principal.tenant_id)]
    return known if principal.user is None else [*known, user_of(principal.tenant_id, principal.user)]


Inference = Annotated[Caller, Depends(Require("inference"))]
MemoryReader = Annotated[Caller, Depends(Require("memory:read"))]
MemoryWriter = Annotated[Caller, Depends(Require("memory:write"))]
RetentionOfficer = Annotated[Caller, Depends(Require("retention"))]
DataEngineer = Annotated[Caller, Depends(Require("validation"))]
Operator = Annotated[Caller, Depends(Require("admin"))]

IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=255, description="The same key gives the same ids: a repeat changes nothing."),
]
