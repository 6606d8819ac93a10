"""Tenants, keys and the state of the system."""

from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tessera.contracts.base import Name, TenantId
from tessera.contracts.events import ConsumerStatus, DependencyStatus, ParkedDecision
from tessera.gateway.domain.keys import DEFAULT_SCOPES, OnDisconnect
from tessera.gateway.domain.limits import MILLIONTHS, Allowance
from tessera.gateway.routes.schemas.common import Body, Instant, Real, View, Whole, as_written, examples

Limit = Annotated[Whole | None, Field(ge=1, le=1_000_000_000)]
Scope = Literal["inference", "memory:read", "memory:write", "retention", "validation", "usage", "admin", "audit"]


class TenantBody(Body):
    """`POST /v1/tenants`."""

    model_config = examples({"id": "acme", "name": "Acme Ltd"})

    id: Annotated[TenantId, Field(description="Lower-case letters, digits, - and _; part of the tenant's topic names.")]
    name: Name | None = None


class TenantView(View):
    """A tenant."""

    id: str
    name: str
    status: Literal["active", "suspended"]
    created_at: datetime


class TenantPage(View):
    """Tenants by id."""

    data: list[TenantView]
    has_more: bool
    next_cursor: str | None


class KeyLimits(Body):
    """What one key may use; where nothing is said, what every key may."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrent_streams: Limit = None
    spend_per_day: Annotated[Real | None, Field(ge=0.000001, le=1_000_000_000, description="In the operator's currency.")] = None

    @property
    def allowance(self) -> Allowance:
        """As the gate takes it."""
        spend = None if self.spend_per_day is None else max(1, round(self.spend_per_day * MILLIONTHS))
        return Allowance(**{**self.model_dump(), "spend_per_day": spend})


class KeyBody(Body):
    """`POST /v1/keys`."""

    model_config = examples({"tenant_id": "acme", "name": "web shop", "scopes": ["inference", "memory:read"]})

    tenant_id: Annotated[TenantId | None, Field(description="Whose key; your own tenant's where absent.")] = None
    name: Name = "unnamed"
    scopes: Annotated[list[Scope], Field(min_length=1, default_factory=lambda: list(DEFAULT_SCOPES))]
    expires_at: Instant | None = None
    limits: Annotated[KeyLimits | None, Field(description="In place of what every key may use (docs/limits.md).")] = None
    on_disconnect: Annotated[
        OnDisconnect | None, Field(description="What a client's leaving means for its generations, where the request does not say.")
    ] = None

    @field_validator("expires_at")
    @classmethod
    def _in_the_future(cls, moment: datetime | None) -> datetime | None:
        if moment is not None and moment <= datetime.now(UTC):
            raise ValueError("expires_at must be in the future")
        return moment


class RotationBody(Body):
    """`POST /v1/keys/{key_id}/rotate`."""

    grace_seconds: Annotated[Whole, Field(ge=0, le=2_592_000, description="How long the secret that the key had still opens it.")] = 86_400


class KeyLimitsView(View):
    """What one key may use; null where that is what every key may."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_streams: int | None
    spend_per_day: float | None


class KeyView(View):
    """A key without its secret."""

    id: str
    tenant_id: str
    name: str
    environment: str
    scopes: list[str]
    status: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    former_until: Annotated[datetime | None, Field(description="Until when the secret before the last rotation opens the key, too.")]
    last_used_at: Annotated[datetime | None, Field(description="To half a minute.")]
    limits: KeyLimitsView
    on_disconnect: OnDisconnect | None


class NewKeyView(KeyView):
    """A key with a new secret: `key` is shown this once."""

    key: str


class KeyPage(View):
    """A tenant's keys by id."""

    data: list[KeyView]
    has_more: bool
    next_cursor: str | None


class ReplicaView(View):
    """One process of a service; `lost` where it has not reported for 30 seconds."""

    instance: str
    status: str
    version: str
    started_at: str
    reported_at: str
    dependencies: list[DependencyStatus]
    consumers: list[ConsumerStatus]


class ServiceView(View):
    """One service: as good as its best replica; `missing` where none ever reported."""

    service: str
    status: str
    lag: Annotated[int, Field(description="Events waiting in all of its consumers.")]
    replicas: list[ReplicaView]


class SpoolView(View):
    """What waits on the disk of the replica that answers because Kafka did not take it."""

    enabled: bool
    records: int
    bytes: int
    oldest_accepted_at: datetime | None
    full: Annotated[bool, Field(description="The last event that came was not taken, by the limit or by the disk: 503.")]


class SpooledView(View):
    """One event that waits."""

    event_id: str
    tenant_id: str
    type: str
    bytes: int
    accepted_at: datetime
    expires_at: Annotated[datetime, Field(description="From then on it is refused as expired instead of applied.")]
    attempts: int
    last_error: str | None


class SpoolPage(View):
    """The spool of the replica that answers, oldest event first."""

    instance: str
    spool: SpoolView
    data: list[SpooledView]
    has_more: bool
    next_cursor: str | None


class ReplayBody(Body):
    """`POST /v1/spool/replay`."""

    model_config = examples({"event_ids": ["m-1"]})

    event_ids: Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], Field(min_length=1, max_length=500)]


class ReplayedView(View):
    """What became of one id: in Kafka, still waiting, or not in the spool of the replica that answers."""

    event_id: str
    status: Literal["published", "waiting", "not_found"]


class ReplayView(View):
    """One result per id, in order."""

    data: list[ReplayedView]


class StatusView(View):
    """The whole system."""

    status: Literal["ok", "degraded", "unavailable"]
    checked_at: str
    models: int
    services: list[ServiceView]
    spool: SpoolView


class ControlBody(Body):
    """`POST /v1/services/{service}/control`."""

    model_config = examples({"action": "pause", "consumer": "ingestion"})

    action: Literal["pause", "resume", "reload"]
    consumer: Annotated[
        Name | None, Field(description="The traffic class to pause or resume, such as `ingestion`; all of them where absent.")
    ] = None
    instance: Annotated[Name | None, Field(description="One replica; all of the service where absent.")] = None
    parked: Annotated[
        ParkedDecision | None,
        as_written(ParkedDecision | None),
        Field(description="With `resume`: only this event is meant, which `/v1/status` shows as stuck."),
    ] = None

    @model_validator(mode="after")
    def _parked_is_resumed(self) -> Self:
        if self.parked is not None and self.action != "resume":
            raise ValueError("parked goes with the action resume")
        return self


class ControlView(View):
    """A command that is on its way to every replica."""

    status: Literal["accepted"]
    service: str
    action: Literal["pause", "resume", "reload"]
    consumer: str | None
    instance: str | None
    parked: ParkedDecision | None


class HealthView(View):
    """Whether this gateway can serve."""

    status: str
