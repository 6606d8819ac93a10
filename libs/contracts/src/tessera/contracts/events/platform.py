"""Tenants, and what services say about themselves."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tessera.contracts.base import EventData, Moment, Name, Record, TenantId


class TenantChanged(EventData):
    """A tenant as it now is; keyed by its id on a compacted topic."""

    event_type: ClassVar[str] = "tessera.tenant.changed.v1"

    tenant: TenantId
    state: Literal["active", "suspended"]
    changed_at: Moment


class DependencyStatus(Record):
    """One dependency of one replica."""

    name: Name
    required: bool
    healthy: bool
    breaker: Literal["closed", "open", "half_open"] = "closed"
    message: Annotated[str | None, Field(max_length=500)] = None


class StuckEvent(Record):
    """An event that failed at every attempt; the events of its key wait until an operator decides."""

    topic: Name
    partition: Annotated[int, Field(ge=0)]
    offset: Annotated[int, Field(ge=0)]
    code: Name
    attempts: Annotated[int, Field(ge=0)]
    since: Moment


class ConsumerStatus(Record):
    """One consumer of one replica."""

    name: Name
    state: Literal["running", "paused", "backing_off", "stopped"]
    partitions: Annotated[int, Field(ge=0)]
    lag: Annotated[int, Field(ge=0)]
    halted: Annotated[str | None, Field(max_length=500, description="Why it stopped itself; `resume` lets it go on.")] = None
    parked: Annotated[int | None, Field(ge=0, description="Events that wait for another attempt, or behind one of their key.")] = None
    stuck: Annotated[tuple[StuckEvent, ...] | None, Field(max_length=20, description="The first of those that wait for an operator.")] = (
        None
    )


class ServiceStatus(EventData):
    """How a replica is; keyed by service and instance on a compacted topic."""

    event_type: ClassVar[str] = "tessera.service.status.v1"

    service: Name
    instance: Name
    state: Literal["starting", "ready", "degraded", "unready", "stopping", "stopped"]
    version: Name
    started_at: Moment
    reported_at: Moment
    dependencies: tuple[DependencyStatus, ...] = ()
    consumers: tuple[ConsumerStatus, ...] = ()


class ParkedDecision(Record):
    """What is to become of one parked event."""

    topic: Name
    partition: Annotated[int, Field(ge=0)]
    offset: Annotated[int, Field(ge=0)]
    outcome: Annotated[Literal["retry", "discard"], Field(description="`discard` makes it a dead letter; its key goes on either way.")]


class ServiceControlled(EventData):
    """An operator asks replicas to pause or resume a consumer, to resume one key behind a parked event, or to reload their settings."""

    event_type: ClassVar[str] = "tessera.service.control.v1"

    service: Name
    action: Literal["pause", "resume", "reload"]
    consumer: Name | None = None
    instance: Annotated[Name | None, Field(description="One replica; all of the service where absent.")] = None
    parked: Annotated[ParkedDecision | None, Field(description="With `resume`: only this event is meant.")] = None
