"""Fakes of the gateway's ports, for tests of one process without a network."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO
from uuid import UUID

import httpx
import pytest

from tessera.bus import DeadLetter, DeadLetterSummary, LetterFilter, LetterPage, Position, Received
from tessera.contracts.base import EventData
from tessera.contracts.events import (
    AuditAction,
    AuditRecorded,
    AuditTarget,
    DatasetReference,
    GenerationRequested,
    ModelDeclared,
    ModelReference,
)
from tessera.gateway.domain import audit, keys
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.audit import Actor
from tessera.gateway.domain.calls import CallRow, Counted
from tessera.gateway.domain.consistency import Tokens
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.keys import StoredKey
from tessera.gateway.domain.records import Ended, GenerationRecord, Since, UsageRow
from tessera.gateway.domain.spool import AcceptedEvent
from tessera.gateway.handlers.access import Authenticator
from tessera.gateway.handlers.auditing import Refusals
from tessera.gateway.handlers.calls import Calls
from tessera.gateway.handlers.generations import Limits
from tessera.gateway.handlers.handoff import Handoff
from tessera.gateway.ports import (
    Call,
    CallQuestion,
    Claim,
    Decision,
    Keep,
    KeptAnswer,
    KeyDescription,
    NewStored,
    Outcome,
    Published,
    RecordPage,
    Repeat,
    Stored,
    StoredPage,
    Tenant,
    UsageQuestion,
)
from tessera.gateway.routes.application import application
from tessera.gateway.routes.context import Rooms
from tessera.gateway.routes.edge import EdgeLimits

PEPPER = b"pepper"


@dataclass
class MemoryLog:
    """`ports.Log` in memory: what was published, and scripted replies."""

    reply_partition: int = 3
    published: list[tuple[EventData, dict[str, Any]]] = field(default_factory=list)
    answers: list[EventData | Exception] = field(default_factory=list)
    replies: list[Located] = field(default_factory=list)
    refuses: Callable[[EventData], ApiError | None] = lambda _: None
    open_streams: int = 0
    sent: list[AcceptedEvent] = field(default_factory=list)
    rejects: Callable[[AcceptedEvent], Exception | None] = lambda _: None
    openings: int | None = None
    requests: dict[tuple[str, str], Received[GenerationRequested]] = field(default_factory=dict)
    searched: list[tuple[str, datetime]] = field(default_factory=list)

    async def publish(self, data: EventData, call: Call, **more: Any) -> Published:
        if error := self.refuses(data):
            raise error
        self.published.append((data, more))
        return Published(more.get("event_id") or "", "topic", 0, 0)

    def accepted(self, data: EventData, call: Call, *, event_id: str, key: bytes, subject_id: str | None = None) -> AcceptedEvent:
        value = data.model_dump_json(exclude_none=True).encode()
        headers = (("ce_id", event_id.encode()), ("ce_source", b"/tessera/gateway"), ("ce_type", data.event_type.encode()))
        return AcceptedEvent(event_id, call.tenant_id, "ingest." + call.tenant_id, key, headers, value, datetime.now(UTC))

    async def send(self, event: AcceptedEvent) -> Position:
        await asyncio.sleep(0)
        if error := self.rejects(event):
            raise error
        self.sent.append(event)
        return Position(event.topic, 0, len(self.sent) - 1)

    async def ask(self, data: EventData, call: Call, *, key: bytes | None = None) -> EventData:
        self.published.append((data, {"key": key}))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def requested(self, tenant_id: str, generation_id: str, at: datetime) -> Received[GenerationRequested] | None:
        self.searched.append((generation_id, at))
        return self.requests.get((tenant_id, generation_id))

    async def next_offset(self, partition: int) -> int:
        return 7

    @asynccontextmanager
    async def stream(self, generation_id: str, *, since: Since | None = None) -> AsyncIterator[AsyncIterator[Located]]:
        self.open_streams += 1
        try:
            yield self._replies()
        finally:
            self.open_streams -= 1

    async def _replies(self) -> AsyncIterator[Located]:
        for reply in self.replies:
            yield reply
        await asyncio.Event().wait()


@dataclass
class MemoryTrail:
    """`ports.AuditTrail` in memory."""

    acts: list[AuditRecorded] = field(default_factory=list)
    away: Exception | None = None

    async def write(self, *acts: AuditRecorded) -> None:
        if self.away is not None:
            raise self.away
        self.acts += acts

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(act.action, act.outcome) for act in self.acts]


@dataclass
class MemoryStore:
    """`ports.Keys`, `ports.Tenants` and `ports.Datasets` in memory."""

    trail: MemoryTrail = field(default_factory=MemoryTrail)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    keys: dict[str, tuple[KeyDescription, bytes]] = field(default_factory=dict)
    former: dict[str, bytes] = field(default_factory=dict)
    used: dict[str, datetime] = field(default_factory=dict)
    away: Exception | None = None
    looked_up: int = 0

    async def find(self, key_id: str) -> StoredKey | None:
        self.looked_up += 1
        if key_id not in self.keys:
            return None
        description, digest = self.keys[key_id]
        return StoredKey(
            description.tenant_id,
            key_id,
            digest,
            frozenset(description.scopes),
            description.expires_at,
            description.revoked_at,
            self.former.get(key_id),
            description.former_until,
            description.allowance,
        )

    async def create(self, tenant: Tenant, by: Actor) -> bool:
        self._record(by, "tenant.create", tenant.id, "tenant", tenant.id)
        return self.tenants.setdefault(tenant.id, tenant) is tenant

    async def list(self, *, after: str | None, limit: int) -> list[Tenant]:
        return [tenant for name, tenant in sorted(self.tenants.items()) if name > (after or "")][:limit]

    async def add_key(self, description: KeyDescription, digest: bytes, by: Actor) -> bool:
        self._record(by, "key.create", description.tenant_id, "key", description.id)
        self.keys[description.id] = (description, digest)
        return description.tenant_id in self.tenants

    async def list_keys(self, tenant_id: str, *, after: str | None, limit: int) -> "list[KeyDescription]":
        return [description for description, _ in self.keys.values()][:limit]

    async def rotate_key(self, key_id: str, digest: bytes, now: datetime, former_until: datetime, by: Actor) -> KeyDescription | None:
        if key_id not in self.keys:
            return None
        description, self.former[key_id] = self.keys[key_id]
        self.keys[key_id] = (replace(description, former_until=former_until), digest)
        self._record(by, "key.rotate", description.tenant_id, "key", key_id)
        return self.keys[key_id][0]

    async def used_keys(self, moments: Mapping[str, datetime]) -> None:
        if self.away is not None:
            raise self.away
        self.used |= moments

    async def revoke_key(self, key_id: str, now: datetime, by: Actor) -> bool:
        self._record(by, "key.revoke", by.tenant_id, "key", key_id)
        return self.keys.pop(key_id, None) is not None

    def _record(self, by: Actor, action: AuditAction, tenant_id: str | None, kind: str, name: str) -> None:
        self.trail.acts.append(audit.record(by, action, tenant_id=tenant_id, target=AuditTarget(kind=kind, id=name)))


class MemoryGenerations:
    """`ports.Generations` in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[bytes, Since]] = {}

    async def claim(self, tenant_id: str, generation_id: str, body_digest: bytes, since: Since) -> Claim:
        first = (tenant_id, generation_id) not in self.rows
        digest, place = self.rows.setdefault((tenant_id, generation_id), (body_digest, since))
        return Claim(first, digest == body_digest, place, datetime.now().astimezone())

    async def claimed_at(self, tenant_id: str, generation_id: str) -> datetime | None:
        return datetime.now().astimezone() if (tenant_id, generation_id) in self.rows else None


class MemoryStored:
    """`ports.StoredCompletions` in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Stored] = {}
        self.away: Exception | None = None

    async def begin(self, tenant_id: str, new: NewStored) -> None:
        self._reach()
        kept = Stored(tenant_id, new.id, new.model, new.metadata, new.request, None, new.since, new.created_at)
        self.rows.setdefault((tenant_id, new.id), kept)

    async def answer(self, tenant_id: str, completion_id: str, answer: str) -> None:
        self._reach()
        row = self.rows.get((tenant_id, completion_id))
        if row is not None and row.answer is None:
            self.rows[tenant_id, completion_id] = replace(row, answer=answer)

    async def give_up(self, tenant_id: str, completion_id: str) -> None:
        self._reach()
        row = self.rows.get((tenant_id, completion_id))
        if row is not None and row.answer is None:
            del self.rows[tenant_id, completion_id]

    async def find(self, tenant_id: str, completion_id: str) -> Stored | None:
        row = self.rows.get((tenant_id, completion_id))
        return row if row is not None and row.answer is not None else None

    async def page(self, tenant_id: str, wanted: StoredPage) -> list[Stored] | None:
        found = [row for (tenant, _), row in self.rows.items() if tenant == tenant_id and row.answer is not None]
        return found[: wanted.limit]

    async def label(self, tenant_id: str, completion_id: str, metadata: Mapping[str, str]) -> Stored | None:
        if await self.find(tenant_id, completion_id) is None:
            return None
        self.rows[tenant_id, completion_id] = replace(self.rows[tenant_id, completion_id], metadata=metadata)
        return await self.find(tenant_id, completion_id)

    async def delete(self, tenant_id: str, completion_id: str) -> bool:
        return self.rows.pop((tenant_id, completion_id), None) is not None

    async def overdue(self, limit: int, again: timedelta) -> list[Stored]:
        return [row for row in self.rows.values() if row.answer is None][:limit]

    async def expire(self, age: timedelta, limit: int) -> int:
        return 0

    def _reach(self) -> None:
        if self.away is not None:
            raise self.away


class MemoryRecords:
    """`ports.GenerationRecords` and `ports.RecordsBeingWritten` in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], GenerationRecord] = {}
        self.sums: list[UsageRow] = []
        self.asked: list[UsageQuestion] = []
        self.away: Exception | None = None

    async def find(self, tenant_id: str, generation_id: str) -> GenerationRecord | None:
        if self.away is not None:
            raise self.away
        return self.rows.get((tenant_id, generation_id))

    async def page(self, tenant_id: str, wanted: RecordPage) -> list[GenerationRecord] | None:
        if wanted.after is not None and (tenant_id, wanted.after) not in self.rows:
            return None
        found = [record for (tenant, _), record in self.rows.items() if tenant == tenant_id and wanted.status in (None, record.status)]
        return found[: wanted.limit]

    async def usage(self, tenant_id: str, question: UsageQuestion) -> list[UsageRow]:
        self.asked.append(question)
        return self.sums

    async def overdue(self, limit: int, again: timedelta) -> list[GenerationRecord]:
        return [record for record in self.rows.values() if record.ended is None][:limit]

    async def count(self, limit: int) -> int:
        return 0

    async def expire(self, age: timedelta, limit: int) -> int:
        return 0

    async def accept(self, records: Sequence[GenerationRecord], look_after: timedelta) -> None:
        for record in records:
            known = self.rows.get((record.tenant_id, record.id))
            self.rows[record.tenant_id, record.id] = replace(record, ended=known.ended if known else None)

    async def end(self, records: Sequence[tuple[GenerationRecord, Ended]] | GenerationRecord, ended: Ended | None = None) -> None:
        told = [(records, ended)] if isinstance(records, GenerationRecord) else records
        for record, end in told:
            known = self.rows.get((record.tenant_id, record.id), record)
            self.rows[record.tenant_id, record.id] = replace(known, ended=known.ended or end)


class MemoryAnswers:
    """`ports.Answers` in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], tuple[bytes, int | None, str | None]] = {}

    async def claim(self, tenant_id: str, repeat: Repeat, lease: timedelta) -> KeptAnswer:
        place = (tenant_id, repeat.operation, repeat.key)
        mine = place not in self.rows
        digest, status, answer = self.rows.setdefault(place, (repeat.body_digest, None, None))
        return KeptAnswer(mine, digest == repeat.body_digest, status, answer)

    async def keep(self, tenant_id: str, repeat: Repeat, status: int, answer: str) -> None:
        self.rows[tenant_id, repeat.operation, repeat.key] = (repeat.body_digest, status, answer)

    async def release(self, tenant_id: str, repeat: Repeat) -> None:
        del self.rows[tenant_id, repeat.operation, repeat.key]

    async def expire(self, age: timedelta, limit: int) -> int:
        return 0


class MemoryCallSums:
    """`ports.CallSums` in memory."""

    def __init__(self) -> None:
        self.added: dict[UUID, tuple[tuple[Counted, int, int], ...]] = {}
        self.troubles: list[Exception] = []

    async def add(self, counts_id: UUID, *rows: tuple[Counted, int, int]) -> None:
        self.added.setdefault(counts_id, rows)
        if self.troubles:
            raise self.troubles.pop()

    async def sums(self, tenant_id: str, question: CallQuestion) -> list[CallRow]:
        return [CallRow(None, None, None, requests, errors) for rows in self.added.values() for _, requests, errors in rows]


class NoDatasets:
    """`ports.Datasets` without any."""

    async def save(self, tenant_id: str, dataset_id: str, file_format: str, file: BinaryIO) -> DatasetReference:
        raise NotImplementedError

    async def find(self, tenant_id: str, dataset_id: str) -> DatasetReference | None:
        return None


class MemoryDeadLetters:
    """`ports.DeadLetters` in memory."""

    def __init__(self) -> None:
        self.all: list[DeadLetter] = []
        self.replayed: list[str] = []
        self.refuses: ApiError | None = None

    async def page(self, wanted: LetterFilter, *, limit: int, keep: Keep, newest_first: bool, cursor: str | None) -> LetterPage:
        found = [letter.summary for letter in self.all if letter.summary.place.topic in wanted.topics() and wanted.matches(letter.summary)]
        return LetterPage([*await keep(found)][:limit], None)

    async def letters(self, ids: Iterable[str]) -> AsyncGenerator[tuple[str, DeadLetter | None], None]:
        known = {letter.summary.id: letter for letter in self.all}
        for name in ids:
            yield name, known.get(name)

    async def replay(self, letter: DeadLetter, *, dry_run: bool) -> None:
        if self.refuses is not None:
            raise self.refuses
        if not dry_run:
            self.replayed.append(letter.summary.id)


class MemoryDecisions:
    """`ports.Decisions` in memory."""

    def __init__(self, trail: MemoryTrail) -> None:
        self.rows: dict[bytes, Decision] = {}
        self._trail = trail

    async def of(self, letters: Sequence[DeadLetterSummary]) -> dict[str, Decision]:
        return {letter.id: self.rows[letter.digest] for letter in letters if letter.digest in self.rows}

    async def decide(self, letter: DeadLetterSummary, outcome: Outcome, act: AuditRecorded) -> None:
        self.rows.setdefault(letter.digest, Decision(outcome, datetime.now().astimezone(), act.actor.id or ""))
        await self._trail.write(act)


@dataclass
class Desk:
    """An application in this process with a client at its door."""

    log: MemoryLog
    store: MemoryStore
    rooms: Rooms
    key: str
    trail: MemoryTrail

    def client(self, key: str | None = None, limits: EdgeLimits | None = None) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(application(self.rooms, limits or EdgeLimits()), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers={"authorization": f"Bearer {key or self.key}"})

    def new_key(self, *scopes: str, tenant_id: str = "default") -> str:
        key = keys.generate("test")
        description = KeyDescription(tenant_id, key.id, "k", "test", scopes, datetime.now().astimezone(), None, None)
        self.store.keys[key.id] = (description, keys.digest(key.secret, PEPPER))
        return key.reveal()


@pytest.fixture
def desk() -> Desk:
    log, store = MemoryLog(), MemoryStore()

    async def ready() -> tuple[bool, str]:
        return True, "ready"

    letters, decisions = MemoryDeadLetters(), MemoryDecisions(store.trail)
    call_sums = MemoryCallSums()
    rooms = Rooms(
        log,
        store,
        NoDatasets(),
        MemoryGenerations(),
        MemoryStored(),
        MemoryRecords(),
        MemoryAnswers(),
        call_sums,
        Calls(call_sums),
        letters,
        decisions,
        store.trail,
        Refusals(store.trail),
        Authenticator(store, PEPPER),
        ready,
        Handoff(log),
        Tokens(PEPPER),
        generation=Limits(),
        instance="gateway-1",
    )
    for model_id, capability in (("chat", "chat"), ("text", "completion"), ("vectors", "embedding")):
        model = ModelReference(
            model_id=model_id,
            provider="local",
            capability=capability,
            encoding="o200k_base",
            template="t",
            exact=True,  # type: ignore[arg-type]
        )
        rooms.models.declare(ModelDeclared(model=model, description="d", owned_by="o"), datetime.now().astimezone())
    made = Desk(log, store, rooms, "", store.trail)
    made.key = made.new_key(*keys.SCOPES)
    return made
