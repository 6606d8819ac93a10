"""Who did what to the platform, and who asks after it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from tessera.contracts.base import EventData, Moment, Name, Record, RequestData, TenantId, Text

MAXIMUM_AUDIT_PAGE: Final = 100
"""So many of the longest entries fit into one answer."""

AuditAction = Literal[
    "tenant.create",
    "key.create",
    "key.rotate",
    "key.revoke",
    "dead_letter.replay",
    "dead_letter.discard",
    "parked_event.retry",
    "parked_event.discard",
    "consumer.pause",
    "consumer.resume",
    "service.reload",
    "spool.replay",
    "policy.set",
    "sweep.start",
    "sweep.cancel",
    "authentication.refused",
    "authorization.refused",
]
"""Every act that is recorded. Writers know no other; the schema names none, so that readers take those of a later revision."""
AuditOutcome = Literal["attempted", "succeeded", "refused", "unknown"]

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}(\.[a-z][a-z0-9_]{0,31})?$")]
Code = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class AuditActor(Record):
    """Who acted."""

    kind: Annotated[Word, Field(description="`key`, `bootstrap`, `operator_key`, or `unknown` for one that no key names.")]
    id: Annotated[Name | None, Field(description="Id of the key, the part of it that is no secret.")] = None
    tenant: Annotated[TenantId | None, Field(description="Whose key it is.")] = None


class AuditTarget(Record):
    """What was acted upon."""

    kind: Annotated[Word, Field(description="Such as `tenant`, `key`, `dead_letter`, `service`, `sweep`.")]
    id: Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class AuditDetail(Record):
    """One thing that an act was told."""

    name: Word
    value: Annotated[Text, StringConstraints(max_length=128)]


class AuditRecorded(EventData):
    """Somebody did something administrative, or was refused. It holds no secret and no content.

    An act that commits in the gateway's Postgres is one event. Any other is two: `attempted`, which is committed before the act begins, and
    then what came of it. `attempted` alone means that the process ended in between: the act may have happened.
    """

    event_type: ClassVar[str] = "tessera.audit.recorded.v1"

    action: Annotated[Word, Field(description="What was done, such as `key.revoke`.")]
    outcome: Annotated[AuditOutcome, Field(description="`unknown`: no answer came in time, or a fault; it may have happened.")]
    actor: AuditActor
    tenant: Annotated[TenantId | None, Field(description="The tenant acted upon; none where it is the platform.")] = None
    target: AuditTarget | None = None
    code: Annotated[Code | None, Field(description="Why it was refused, or what is not known.")] = None
    details: Annotated[tuple[AuditDetail, ...], Field(max_length=2, description="What the act was told to do.")] = ()
    count: Annotated[int, Field(ge=1, description="How often: refusals of one minute are one event.")] = 1
    client_address: Annotated[Text | None, StringConstraints(max_length=64)] = None
    request_id: Annotated[Text | None, StringConstraints(max_length=128)] = None
    occurred_at: Moment


class AuditInspected(RequestData):
    """What was done? The asker's tenant is the event's; only one that may see every tenant asks for the whole platform."""

    event_type: ClassVar[str] = "tessera.audit.inspected.v1"

    whole_platform: Annotated[bool, Field(description="Every tenant's records, and those of none.")] = False
    tenant: Annotated[TenantId | None, Field(description="With `whole_platform`: only what was done to this tenant.")] = None
    actor: Annotated[Name | None, Field(description="Id of the actor.")] = None
    action: Word | None = None
    target: Annotated[Text | None, StringConstraints(min_length=1, max_length=256)] = None
    since: Moment | None = None
    until: Moment | None = None
    limit: Annotated[int, Field(ge=1, le=MAXIMUM_AUDIT_PAGE)] = 50
    after: Annotated[str | None, Field(max_length=256, description="Cursor of the page before.")] = None


class AuditEntry(Record):
    """One record of the trail."""

    id: Name
    record: AuditRecorded


class AuditReported(EventData):
    """One page of the trail, the newest first."""

    event_type: ClassVar[str] = "tessera.audit.reported.v1"

    entries: Annotated[tuple[AuditEntry, ...], Field(max_length=MAXIMUM_AUDIT_PAGE)] = ()
    next_cursor: str | None = None
