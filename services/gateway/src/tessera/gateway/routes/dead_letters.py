"""`/v1/dead-letters`: what could not be handled, for operators."""

from base64 import b64encode
from collections import Counter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query

from tessera.bus import DeadLetter, DeadLetterSummary, LetterFilter
from tessera.gateway.domain.contents import as_json, as_text
from tessera.gateway.handlers import dead_letters
from tessera.gateway.handlers.dead_letters import Desk, Order, Settled, Status
from tessera.gateway.ports import Decision, Outcome
from tessera.gateway.routes.context import Caller, Operator
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.common import ErrorDetail, Instant
from tessera.gateway.routes.schemas.dead_letters import (
    ContentView,
    Cursor,
    DeadLetterPage,
    DeadLetterView,
    HeaderView,
    LettersBody,
    Service,
    SettledPage,
    SettledView,
    Text,
    ValueView,
    WholeDeadLetterView,
)

router = APIRouter(route_class=CarefulRoute, tags=["administration"])


@router.get("/v1/dead-letters")
async def list_dead_letters(
    caller: Operator,
    *,
    topic: Annotated[Text | None, Query(description="Where the event was; `ingest` stands for every tenant's, too.")] = None,
    service: Annotated[Service | None, Query(description="Whose consumer refused it.")] = None,
    code: Annotated[Text | None, Query(description="The reason, such as `tenant_unknown`.")] = None,
    since: Annotated[Instant | None, Query(description="Refused at or after.")] = None,
    until: Annotated[Instant | None, Query(description="Refused before.")] = None,
    event_id: Annotated[Text | None, Query(description="The event's own id.")] = None,
    tenant_id: Annotated[Text | None, Query(description="The topic's owner, or the tenant that the event claims.")] = None,
    status: Annotated[Status, Query()] = "pending",
    order: Annotated[Literal["newest", "oldest"], Query()] = "newest",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[Cursor | None, Query(description="next_cursor of the page before; the other parameters must be the same.")] = None,
) -> DeadLetterPage:
    """Dead letters that nobody has decided about, unless `status` asks for others."""
    wanted = LetterFilter(topic=topic, service=service, code=code, since=since, until=until, event_id=event_id, tenant_id=tenant_id)
    page = await dead_letters.listing(_desk(caller), wanted, status, limit=limit, newest_first=order == "newest", cursor=after)
    data = [DeadLetterView(**_fields(letter, decision)) for letter, decision in page.letters]
    return DeadLetterPage(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)


@router.get("/v1/dead-letters/{letter_id}")
async def retrieve_dead_letter(letter_id: Annotated[str, Path(min_length=1, max_length=256)], caller: Operator) -> WholeDeadLetterView:
    """One dead letter with the original key, headers and bytes."""
    return _whole_view(*await dead_letters.find(_desk(caller), letter_id))


@router.post("/v1/dead-letters/replay")
async def replay_dead_letters(body: LettersBody, caller: Operator) -> SettledPage:
    """Publish the original events again. Each has its effect once, however often it is replayed."""
    return await _settled(body, caller, "replayed")


@router.post("/v1/dead-letters/discard")
async def discard_dead_letters(body: LettersBody, caller: Operator) -> SettledPage:
    """Remember that nothing shall be done. The bytes stay in the log."""
    return await _settled(body, caller, "discarded")


async def _settled(body: LettersBody, caller: Caller, outcome: Outcome) -> SettledPage:
    desk, cursor, ids = _desk(caller), None, body.ids
    if ids is None:
        wanted = body.filter.wanted() if body.filter else LetterFilter()
        page = await dead_letters.listing(desk, wanted, "pending", limit=body.limit, newest_first=False, cursor=body.after)
        ids, cursor = [letter.id for letter, _ in page.letters], page.next_cursor
    settled = await dead_letters.settle(desk, ids, Order(outcome, caller.actor, body.dry_run))
    counts = dict(Counter(one.result for one in settled))
    data = [_settled_view(one) for one in settled]
    return SettledPage(dry_run=body.dry_run, counts=counts, data=data, has_more=cursor is not None, next_cursor=cursor)


def _desk(caller: Caller) -> Desk:
    return Desk(caller.rooms.dead_letters, caller.rooms.decisions, caller.rooms.trail)


def _settled_view(one: Settled) -> SettledView:
    error = None if one.error is None else ErrorDetail(**one.error.body()["error"])
    return SettledView(id=one.id, result=one.result, error=error)


def _fields(letter: DeadLetterSummary, decision: Decision | None) -> dict[str, Any]:
    origin, attributes = letter.origin, letter.attributes
    return {
        "id": letter.id,
        "status": decision.outcome if decision else "pending",
        "service": letter.service,
        "topic": origin.topic if origin else None,
        "partition": origin.partition if origin else None,
        "offset": origin.offset if origin else None,
        "code": letter.code,
        "message": letter.message,
        "field": letter.field,
        "error": letter.error,
        "attempts": letter.attempts,
        "replays": letter.replays,
        "refused_at": letter.refused_at,
        "tenant_id": letter.tenant_id,
        "event_id": attributes.get("id"),
        "event_type": attributes.get("type"),
        "source": attributes.get("source"),
        "request_id": attributes.get("requestid"),
        "trace_id": _trace_id(attributes.get("traceparent")),
        "size_bytes": letter.size_bytes,
        "decided_at": decision.decided_at if decision else None,
        "decided_by": decision.decided_by if decision else None,
    }


def _trace_id(traceparent: str | None) -> str | None:
    """The second field of W3C's traceparent."""
    parts = (traceparent or "").split("-")
    return parts[1] if len(parts) >= 4 else None


def _whole_view(letter: DeadLetter, decision: Decision | None) -> WholeDeadLetterView:
    return WholeDeadLetterView(
        **_fields(letter.summary, decision),
        key=None if letter.key is None else ContentView(**_content(letter.key)),
        headers=[HeaderView(name=name, **_content(content)) for name, content in letter.headers],
        value=ValueView(json=as_json(letter.value), **_content(letter.value)),
    )


def _content(content: bytes) -> dict[str, Any]:
    return {"base64": b64encode(content).decode(), "text": as_text(content)}
