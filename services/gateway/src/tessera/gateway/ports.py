"""What the handlers need from the world outside. Every method may raise ApiError 503 when its dependency cannot be reached."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, BinaryIO, Literal, Protocol
from uuid import UUID

from tessera.bus import DeadLetter, DeadLetterSummary, LetterFilter, LetterPage, Position, Received
from tessera.contracts.base import EventData, RequestData
from tessera.contracts.events import AuditRecorded, DatasetReference, GenerationRequested
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.backlog import Place, Waiting
from tessera.gateway.domain.calls import CallRow, Counted
from tessera.gateway.domain.keys import OnDisconnect, StoredKey
from tessera.gateway.domain.limits import UNLIMITED, Allowance, Holder, Standing, Window
from tessera.gateway.domain.records import Ended, GenerationRecord, Since, Status, UsageRow
from tessera.gateway.domain.spool import AcceptedEvent

Outcome = Literal["replayed", "discarded"]
Keep = Callable[[Sequence[DeadLetterSummary]], Awaitable[Sequence[DeadLetterSummary]]]


@dataclass(frozen=True)
class Call:
    """The request being served, as its events carry it."""

    tenant_id: str
    request_id: str
    patience: timedelta = timedelta(seconds=15)
    """Longest wait for an answer."""


@dataclass(frozen=True)
class Tenant:
    """A tenant's row."""

    id: str
    name: str
    state: str
    created_at: datetime


@dataclass(frozen=True)
class KeyDescription:
    """A key's row without its digest."""

    tenant_id: str
    id: str
    name: str
    environment: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    allowance: Allowance = UNLIMITED
    former_until: datetime | None = None
    """Until when the secret before the last rotation opens what the key opens."""
    last_used_at: datetime | None = None
    """To half a minute."""
    on_disconnect: OnDisconnect | None = None


@dataclass(frozen=True)
class Published:
    """Where an event went."""

    event_id: str
    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Claim:
    """A generation with an Idempotency-Key: who came first, and where its replies are."""

    first: bool
    same_body: bool
    since: Since
    created_at: datetime


@dataclass(frozen=True)
class Decision:
    """What an operator decided about a dead letter."""

    outcome: Outcome
    decided_at: datetime
    decided_by: str
    """Id of the key."""


class Log(Protocol):
    """Events, questions and streams over the bus."""

    @property
    def reply_partition(self) -> int:
        """The reply partition that this process reads."""
        ...

    async def publish(
        self,
        data: EventData,
        call: Call,
        *,
        event_id: str | None = None,
        key: bytes | None = None,
        subject_id: str | None = None,
        deadline: datetime | None = None,
    ) -> Published:
        """Returns once every in-sync replica has it. Raises ApiError 413 for an event that is too large."""
        ...

    def accepted(self, data: EventData, call: Call, *, event_id: str, key: bytes, subject_id: str | None = None) -> AcceptedEvent:
        """An ingested event as the record that `send` publishes. Raises ApiError 413 for one that is too large."""
        ...

    async def send(self, event: AcceptedEvent) -> Position:
        """Where the record is, once every in-sync replica has it. Raises ApiError 503 when Kafka does not confirm."""
        ...

    @property
    def openings(self) -> int | None:
        """How many events it makes sense to send now: 0 while the breaker is open, 1 for its probe, None for any number."""
        ...

    async def ask(self, data: RequestData, call: Call, *, key: bytes | None = None) -> EventData:
        """The answer. Raises ApiError with the answering service's problem, or 504 `timed_out` when the caller's patience is over."""
        ...

    async def requested(self, tenant_id: str, generation_id: str, at: datetime) -> Received[GenerationRequested] | None:
        """The request of a generation, from the log itself, if it was written at about `at` or later."""
        ...

    async def next_offset(self, partition: int) -> int:
        """A place in our reply partition before every reply to what is published from now on."""
        ...

    def stream(self, generation_id: str, *, since: Since | None = None) -> AbstractAsyncContextManager[AsyncIterator[Located]]:
        """Every reply of a generation from the moment the context is entered: enter it before publishing the request.

        With `since` the log is read again from there, also if another process was the first to. Entering raises ApiError 410 where the log
        no longer holds it; the iterator raises ApiError 503 where it is lost or its reader is too slow.
        """
        ...


class SpoolStore(Protocol):
    """Accepted events on disk. Every method may raise OSError where it says so."""

    @property
    def size_bytes(self) -> int:
        """Size of what this process holds."""
        ...

    @property
    def full(self) -> bool:
        """Whether the last event that came was not taken, by the limit or by the disk, and nothing has made room since."""
        ...

    async def append(self, event: AcceptedEvent) -> Place:
        """Returns when the record is durable. Raises RetryableError `spool_full` or `spool_unwritable`; then it is not kept."""
        ...

    async def read(self, place: Place) -> AcceptedEvent:
        """The event at a place. Raises ValueError where what was written does not come back, OSError where the disk fails."""
        ...

    async def settle(self, place: Place, *, set_aside: bool = False) -> None:
        """The record is no longer needed. `set_aside` keeps its file for a person. Raises OSError."""
        ...

    async def adopt(self) -> Sequence[Waiting]:
        """Takes what dead processes left, oldest first. Raises OSError."""
        ...


class AuditTrail(Protocol):
    """Who did what. Append-only."""

    async def write(self, *acts: AuditRecorded) -> None:
        """Returns once all of them are durable, or none is. Raises RetryableError or CircuitOpenError."""
        ...


class Tenants(Protocol):
    """Tenants and keys, for the operator. What changes one of them commits together with the record of who did."""

    async def create(self, tenant: Tenant, by: Actor) -> bool:
        """Makes the topics, then the row and its event in one transaction. False where the tenant exists already."""
        ...

    async def list(self, *, after: str | None, limit: int) -> Sequence[Tenant]:
        """By id, those after `after`."""
        ...

    async def add_key(self, description: KeyDescription, digest: bytes, by: Actor) -> bool:
        """False where the tenant does not exist, or the same key does. The same id with another digest or scopes takes those."""
        ...

    async def list_keys(self, tenant_id: str, *, after: str | None, limit: int) -> Sequence[KeyDescription]:
        """A tenant's keys by id, revoked ones included."""
        ...

    async def rotate_key(self, key_id: str, digest: bytes, now: datetime, former_until: datetime, by: Actor) -> KeyDescription | None:
        """Another secret; the one it had lives until `former_until`, one before that no more. None for a key that opens nothing."""
        ...

    async def used_keys(self, moments: Mapping[str, datetime]) -> None:
        """Remembers when keys were last used."""
        ...

    async def revoke_key(self, key_id: str, now: datetime, by: Actor) -> bool:
        """False where no such key exists; revoking twice keeps the first moment."""
        ...


class Generations(Protocol):
    """Generations that have an Idempotency-Key. Others leave no row."""

    async def claim(self, tenant_id: str, generation_id: str, body_digest: bytes, since: Since) -> Claim:
        """Writes the row, or finds the one that is there."""
        ...

    async def claimed_at(self, tenant_id: str, generation_id: str) -> datetime | None:
        """When the row was written; None where there is none."""
        ...


@dataclass(frozen=True)
class Repeat:
    """A request with an Idempotency-Key: what tells it from others."""

    operation: str
    """Method and path."""
    key: str
    body_digest: bytes


@dataclass(frozen=True)
class KeptAnswer:
    """What stands under an Idempotency-Key. Without an answer it is being worked on."""

    mine: bool
    """Whether it was taken by this very request."""
    same_body: bool
    status: int | None
    answer: str | None


class Answers(Protocol):
    """Answers that can be asked for again. Raises RetryableError where they cannot be reached."""

    async def claim(self, tenant_id: str, repeat: Repeat, lease: timedelta) -> KeptAnswer:
        """Takes the key, or finds who has it. One that was taken longer ago than its lease, and not answered, is taken over."""
        ...

    async def keep(self, tenant_id: str, repeat: Repeat, status: int, answer: str) -> None:
        """The answer from now on, unless there is one."""
        ...

    async def release(self, tenant_id: str, repeat: Repeat) -> None:
        """The key is free again, unless it has an answer."""
        ...

    async def expire(self, age: timedelta, limit: int) -> int:
        """Deletes at most `limit` of any tenant that are older; how many."""
        ...


@dataclass(frozen=True)
class RecordPage:
    """Which generations are wanted; all that are given have to hold."""

    limit: int
    newest_first: bool = True
    after: str | None = None
    model: str | None = None
    credential_id: str | None = None
    status: Status | None = None


@dataclass(frozen=True)
class UsageQuestion:
    """What is to be added up, by what, over which days (both ends included)."""

    since: date
    until: date
    groups: tuple[str, ...]
    """Of `day`, `credential_id` and `model_id`."""
    limit: int
    model: str | None = None
    credential_id: str | None = None


@dataclass(frozen=True)
class CallQuestion:
    """Which calls are to be added up, by what, over which days (both ends included)."""

    since: date
    until: date
    groups: tuple[str, ...]
    """Of `day`, `credential_id` and `operation`."""
    limit: int
    operation: str | None = None
    credential_id: str | None = None


class CallSums(Protocol):
    """How many calls there were. Raises RetryableError where it cannot be reached."""

    async def add(self, counts_id: UUID, *rows: tuple[Counted, int, int]) -> None:
        """Adds requests and errors; the same id again adds nothing."""
        ...

    async def sums(self, tenant_id: str, question: CallQuestion) -> Sequence[CallRow]:
        """In the order of the groups."""
        ...


class GenerationRecords(Protocol):
    """What became of generations, as their events tell. Raises RetryableError where it cannot be reached."""

    async def find(self, tenant_id: str, generation_id: str) -> GenerationRecord | None:
        """One whose request has been told; None for another tenant's."""
        ...

    async def page(self, tenant_id: str, wanted: RecordPage) -> Sequence[GenerationRecord] | None:
        """By the time of the request; None where `after` is not there."""
        ...

    async def usage(self, tenant_id: str, question: UsageQuestion) -> Sequence[UsageRow]:
        """Sums of all that ended, each generation once, in the order of the groups."""
        ...

    async def overdue(self, limit: int, again: timedelta) -> Sequence[GenerationRecord]:
        """Of any tenant, those whose end should have been told by now; each is given out again after `again`."""
        ...

    async def end(self, record: GenerationRecord, ended: Ended) -> None:
        """Writes an end that no event told, unless there is one."""
        ...

    async def count(self, limit: int) -> int:
        """Adds at most `limit` ended generations to the sums; how many."""
        ...

    async def expire(self, age: timedelta, limit: int) -> int:
        """Deletes at most `limit` that ended longer ago and are in the sums; how many."""
        ...


class RecordsBeingWritten(Protocol):
    """The same, in the transaction of the events being handled. The two events of a generation may come in either order."""

    async def accept(self, records: Sequence[GenerationRecord], look_after: timedelta) -> None:
        """Writes what the requests tell; the end is looked for `look_after` the deadline."""
        ...

    async def end(self, records: Sequence[tuple[GenerationRecord, Ended]]) -> None:
        """Writes the ends, where there is none yet."""
        ...


@dataclass(frozen=True)
class NewStored:
    """A chat that is to be kept, before its generation runs."""

    id: str
    model: str
    metadata: Mapping[str, str]
    request: str
    """Messages and parameters, as JSON."""
    subject_id: str | None
    since: Since
    created_at: datetime
    look_at: datetime
    """When its generation is over, however it went."""


@dataclass(frozen=True)
class Stored:
    """A chat that was kept, or (without an answer) one whose end is not known yet."""

    tenant_id: str
    id: str
    model: str
    metadata: Mapping[str, str]
    request: str
    answer: str | None
    since: Since
    created_at: datetime


@dataclass(frozen=True)
class StoredPage:
    """Which kept chats are wanted; all that are given have to hold."""

    limit: int
    newest_first: bool = False
    after: str | None = None
    model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class StoredCompletions(Protocol):
    """Chats that their askers want kept. Raises RetryableError where they cannot be reached."""

    async def begin(self, tenant_id: str, new: NewStored) -> None:
        """Writes the row, unless it is there."""
        ...

    async def answer(self, tenant_id: str, completion_id: str, answer: str) -> None:
        """Sets the answer where there is none yet; nothing where the row was deleted meanwhile."""
        ...

    async def give_up(self, tenant_id: str, completion_id: str) -> None:
        """Deletes the row if it has no answer."""
        ...

    async def find(self, tenant_id: str, completion_id: str) -> Stored | None:
        """One that has its answer."""
        ...

    async def page(self, tenant_id: str, wanted: StoredPage) -> Sequence[Stored] | None:
        """Those that have their answer, by the time of their request; None where `after` is not there."""
        ...

    async def label(self, tenant_id: str, completion_id: str, metadata: Mapping[str, str]) -> Stored | None:
        """Replaces the metadata of one that has its answer."""
        ...

    async def delete(self, tenant_id: str, completion_id: str) -> bool:
        """False where there is none with an answer."""
        ...

    async def overdue(self, limit: int, again: timedelta) -> Sequence[Stored]:
        """Of any tenant, those without an answer that are to be looked at now; each is given out again after `again`."""
        ...

    async def expire(self, age: timedelta, limit: int) -> int:
        """Deletes at most `limit` of any tenant that are older; how many."""
        ...


class Keys(Protocol):
    """The look-up of authentication."""

    async def find(self, key_id: str) -> StoredKey | None:
        """The key by its public id, of whichever tenant."""
        ...


class AccessTokens(Protocol):
    """Tokens of the OpenID provider."""

    async def claims(self, token: str) -> Mapping[str, Any]:
        """What a token says, once signature, issuer, audience and times have been checked. Any text is safe to give.

        Raises TokenRefusedError, and ApiError 503 where the provider has to be asked for the key and cannot be.
        """
        ...


class ActiveTenants(Protocol):
    """The look-up of a token's tenant."""

    async def is_active(self, tenant_id: str) -> bool:
        """Whether there is such a tenant and it may be served."""
        ...


class Datasets(Protocol):
    """Uploaded datasets."""

    async def save(self, tenant_id: str, dataset_id: str, file_format: str, file: BinaryIO) -> DatasetReference:
        """Stores the file, then its row; the same id again gives the same dataset.

        Raises ApiError 400 `empty_file`, 409 for another file.
        """
        ...

    async def find(self, tenant_id: str, dataset_id: str) -> DatasetReference | None:
        """None where this tenant has no such dataset."""
        ...


class DeadLetters(Protocol):
    """Dead letters of every service, in the log. Raises RetryableError and TimedOutError where it cannot be read."""

    async def page(self, wanted: LetterFilter, *, limit: int, keep: Keep, newest_first: bool, cursor: str | None) -> LetterPage:
        """Those that are wanted and kept. Raises InvalidError `invalid_value` for a topic or a cursor that does not exist."""
        ...

    def letters(self, ids: Iterable[str]) -> AsyncGenerator[tuple[str, DeadLetter | None], None]:
        """Each letter named, whole, in the order of the log; None where there is no such letter."""
        ...

    async def replay(self, letter: DeadLetter, *, dry_run: bool) -> None:
        """Publishes the original again; in a dry run only looks whether it could. Raises ApiError where it cannot."""
        ...


class Decisions(Protocol):
    """What was decided about dead letters."""

    async def of(self, letters: Sequence[DeadLetterSummary]) -> dict[str, Decision]:
        """By the letter's id; those not decided on are missing."""
        ...

    async def decide(self, letter: DeadLetterSummary, outcome: Outcome, act: AuditRecorded) -> None:
        """Remembers a decision of the actor, unless there is one: the first stands. The act is on record with it, or neither is."""
        ...


@dataclass(frozen=True)
class Seat:
    """A place among the concurrent streams of a holder."""

    holder: Holder
    limit: int


class Counters(Protocol):
    """Counts that every replica shares. What cannot be reached refuses nobody: the methods answer None then."""

    async def standings(self, windows: Sequence[Window]) -> Sequence[Standing] | None:
        """How each window stands, in the order given."""
        ...

    async def count(self, windows: Sequence[Window], cost: int) -> Sequence[Standing] | None:
        """Counts `cost` in every window, or in none where one has no room for it. How each stood before, in the order given."""
        ...

    async def take(self, windows: Sequence[Window], cost: int) -> Sequence[bool] | None:
        """Counts `cost` in each window that has room for it, and says which had."""
        ...

    async def enter(self, seats: Sequence[Seat], stream_id: str, longest: timedelta) -> Seat | None:
        """Takes a seat of each, or none: the answer is one that has no room. A seat is given back by `leave`, or after `longest`."""
        ...

    async def leave(self, seats: Sequence[Seat], stream_id: str) -> None:
        """Gives them back. May be called again."""
        ...
