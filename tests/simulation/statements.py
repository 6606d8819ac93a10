"""One function per statement of the code under test: what it does to the model's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Final

from simulation.postgres import Result, Row, Session, Values
from sqlalchemy import text

from tessera.bus import freshness, inbox, outbox, parked, positions, relay
from tessera.storage import database
from tessera.storage.delivery import outbox_channel

SERVICE: Final = "memory"
_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)

PING: Final = text("SELECT 1")
"""What `Database.check` asks."""
APPLY: Final = text("INSERT INTO effect (event_id, key) VALUES (:event_id, :key)")
"""The handler's effect; `position` counts by itself."""
LOCK_KEY: Final = text(
    "INSERT INTO turn (key, number) VALUES (:key, 1) ON CONFLICT (key) DO UPDATE SET number = turn.number + 1 RETURNING number"
)
"""The row lock of an aggregate, under which its events get their order."""

APPLIED: Final = text("SELECT event_id FROM effect")
"""What a reader finds."""

# --- positions and marks --------------------------------------------------------------------------


def _selected(row: Row, names: tuple[str, ...]) -> Row:
    return Row(**{name: getattr(row, name) for name in names})


def _place(values: Values) -> tuple[Any, ...]:
    return values["consumer"], values["topic"], values["partition"]


def read_position(session: Session, values: Values) -> Result:
    row = session.get("consumer_position", _place(values))
    return Result([] if row is None else [Row(next_offset=row.next_offset)])


def lock_position(session: Session, values: Values) -> Result:
    if session.get("consumer_position", _place(values)) is not None:
        session.claim("consumer_position", [_place(values)])
    return read_position(session, values)


def begin_position(session: Session, values: Values) -> Result:
    place = _place(values)
    session.look("consumer_position", [place], written=True)
    if session.get("consumer_position", place) is not None:
        return Result(rowcount=0)
    session.claim("consumer_position", [place])
    session.write("consumer_position", place, Row(next_offset=values["next_offset"]))
    return Result(rowcount=1)


def advance_position(session: Session, values: Values) -> Result:
    """The mark goes in any case: the transaction does not outlive a fence that does not match."""
    matches = _move(session, values)
    clear_mark(session, values)
    return Result([Row(moved=int(matches))])


def advance_and_mark(session: Session, values: Values) -> Result:
    matches = _move(session, values)
    if matches:
        _write_mark(session, values)
    return Result([Row(moved=int(matches))])


def _places(values: Values) -> list[Values]:
    """Values of each partition by itself, in the order in which rows are locked."""
    names = {"on_topics": "topic", "on_partitions": "partition", "stored": "stored", "firsts": "first", "lasts": "last"}
    names |= {"next_offsets": "next_offset"} if "next_offsets" in values else {}
    columns = zip(*(values[given] for given in names), strict=True)
    rows = [{"consumer": values["consumer"], "attempts": 1, **dict(zip(names.values(), column, strict=True))} for column in columns]
    return sorted(rows, key=_place)


def advance_all(session: Session, values: Values) -> Result:
    """All rows are held before the first is moved."""
    places = _places(values)
    held = [place for place in places if _holds(session, place)]
    for place in held:
        _move(session, place)
    for place in places:
        if place["first"] is None:
            clear_mark(session, place)
        elif place in held:
            _write_mark(session, place)
    return Result([Row(moved=len(held))])


def advance_all_and_publish(session: Session, values: Values) -> Result:
    write_outbox(session, values)
    return advance_all(session, values)


def set_marks(session: Session, values: Values) -> Result:
    held = [place for place in _places(values) if _holds(session, place)]
    for place in held:
        _write_mark(session, place)
    return Result([Row(topic=place["topic"], partition=place["partition"]) for place in held])


def _holds(session: Session, values: Values) -> bool:
    row = session.get("consumer_position", _place(values))
    if row is None or row.next_offset != values["stored"]:
        return False
    session.claim("consumer_position", [_place(values)])
    return True


def _move(session: Session, values: Values) -> bool:
    place = _place(values)
    row = session.get("consumer_position", place)
    matches = row is not None and row.next_offset == values["stored"]
    if matches:
        session.claim("consumer_position", [place])
        session.write("consumer_position", place, Row(next_offset=values["next_offset"]))
    return matches


def read_mark(session: Session, values: Values) -> Result:
    row = session.get("batch_mark", _place(values))
    return Result([] if row is None else [row])


def set_mark(session: Session, values: Values) -> Result:
    place = _place(values)
    row = session.get("consumer_position", place)
    if row is None or row.next_offset != values["stored"]:
        return Result([Row(marked=0)])
    session.claim("consumer_position", [place])  # FOR SHARE: two sharers would not wait for each other, but they wait at the mark anyway
    _write_mark(session, values)
    return Result([Row(marked=1)])


def _write_mark(session: Session, values: Values) -> None:
    place = _place(values)
    session.claim("batch_mark", [place])
    session.write("batch_mark", place, Row(first_offset=values["first"], last_offset=values["last"], attempts=values["attempts"]))


def clear_mark(session: Session, values: Values) -> Result:
    place = _place(values)
    if session.get("batch_mark", place) is None:
        return Result(rowcount=0)
    session.claim("batch_mark", [place])
    session.write("batch_mark", place, None)
    return Result(rowcount=1)


# --- parked events --------------------------------------------------------------------------------
_PARKED_COLUMNS: Final = {
    "tenant_id": "tenants",
    "identity": "identities",
    "key": "keys",
    "state": "states",
    "attempts": "attempts",
    "code": "codes",
    "message": "messages",
    "traceparent": "traces",
    "record_milliseconds": "milliseconds",
    "headers": "headers",
    "value": "contents",
}


_PARKED_KEPT: Final = ("tenant_id", "identity", "key", "traceparent", "failures", "parked_at")
"""What is not replaced when the event is written again."""
_PARKED_LOADED: Final = ("offset", "tenant_id", "key", "state", "attempts", "failures", "code", "parked_at")


def _parked_places(values: Values) -> list[tuple[Any, ...]]:
    places = zip(values["topics"], values["partitions"], values["offsets"], strict=True)
    return [(values["consumer"], topic, partition, offset) for topic, partition, offset in places]


def write_parked(session: Session, values: Values) -> Result:
    places = _parked_places(values)
    session.claim("parked", places)
    for number, place in enumerate(places):
        columns = {name: values[given][number] for name, given in _PARKED_COLUMNS.items()}
        due_at = session.now + values["dues"][number]
        row = Row(
            topic=place[1],
            partition=place[2],
            offset=place[3],
            failures=0,
            due_at=due_at,
            parked_at=_EPOCH,
            changed_at=session.now,
            **columns,
        )
        before = session.get("parked", place)
        if before is not None:
            row = Row(**{**vars(row), **{name: getattr(before, name) for name in _PARKED_KEPT}})
        session.write("parked", place, row)
    return Result(rowcount=len(places))


def remove_parked(session: Session, values: Values) -> Result:
    return _delete_parked(session, [place for place in _parked_places(values) if session.get("parked", place) is not None])


def settle_parked(session: Session, values: Values) -> Result:
    events = set(zip(values["tenants"], values["identities"], strict=True))
    rows = session.rows("parked").items()
    return _delete_parked(
        session,
        [
            place
            for place, row in rows
            if place[0] == values["consumer"] and (row.tenant_id, row.identity) in events and row.state in ("refused", "dead")
        ],
    )


def _delete_parked(session: Session, places: list[tuple[Any, ...]]) -> Result:
    session.claim("parked", places)
    for place in places:
        session.write("parked", place, None)
    return Result(rowcount=len(places))


def load_parked(session: Session, values: Values) -> Result:
    rows = [
        Row(due_in=row.due_at - session.now, **vars(_selected(row, _PARKED_LOADED)))
        for place, row in session.rows("parked").items()
        if place[:3] == _place(values) and row.state in ("waiting", "stuck")
    ]
    return Result(sorted(rows, key=lambda row: row.offset))


def _matching_parked(session: Session, values: Values, states: tuple[str, ...]) -> Row | None:
    """The row that the statement locks, if there is one."""
    place = (*_place(values), values["offset"])
    row = session.get("parked", place)
    if row is None or row.state not in states or ("failures" in values and row.failures != values["failures"]):
        return None
    session.claim("parked", [place])
    return row


def _update_parked(session: Session, values: Values, states: tuple[str, ...], **changes: Any) -> Row | None:
    place = (*_place(values), values["offset"])
    row = _matching_parked(session, values, states)
    if row is None:
        return None
    changed = Row(**{**vars(row), **{name: change(row) for name, change in changes.items()}})
    session.write("parked", place, changed)
    return changed


def begin_parked(session: Session, values: Values) -> Result:
    row = _update_parked(session, values, ("waiting",), failures=lambda row: row.failures + 1)
    names = ("attempts", "failures", "key", "record_milliseconds", "headers", "value")
    return Result([] if row is None else [_selected(row, names)])


def end_parked(session: Session, values: Values) -> Result:
    if _matching_parked(session, values, ("waiting",)) is None:
        return Result(rowcount=0)
    session.write("parked", (*_place(values), values["offset"]), None)
    return Result(rowcount=1)


def postpone_parked(session: Session, values: Values) -> Result:
    row = _update_parked(
        session,
        values,
        ("waiting",),
        failures=lambda row: row.failures - values["back"],
        attempts=lambda row: row.attempts + values["spent"],
        state=lambda _: values["state"],
        code=lambda row: values["code"] or row.code,
        message=lambda row: values["message"] or row.message,
        due_at=lambda _: session.now + values["due_in"],
    )
    return Result(rowcount=int(row is not None))


def release_parked(session: Session, values: Values) -> Result:
    row = _update_parked(
        session,
        values,
        ("waiting", "stuck"),
        state=lambda _: "waiting",
        attempts=lambda _: 0,
        failures=lambda _: 0,
        due_at=lambda _: session.now,
        code=lambda _: values["code"],
    )
    return Result(rowcount=int(row is not None))


def prune_parked(session: Session, values: Values) -> Result:
    old = session.now - values["age"]
    places = [place for place, row in session.rows("parked").items() if row.state in ("refused", "dead") and row.changed_at < old]
    return _delete_parked(session, places[: values["rows"]])


# --- inbox ----------------------------------------------------------------------------------------
def _entries(values: Values) -> list[tuple[Any, ...]]:
    return [(tenant, values["consumer"], identity) for tenant, identity in zip(values["tenants"], values["identities"], strict=True)]


def enter_inbox(session: Session, values: Values) -> Result:
    keys = _entries(values)
    for key in keys:  # row by row, as Postgres does: what comes first is held while the next is waited for
        session.look("inbox", [key])
        if session.get("inbox", key) is None:
            session.claim("inbox", [key])
    new = []
    for key, body in zip(keys, values["bodies"], strict=True):
        if session.get("inbox", key) is None:
            session.write("inbox", key, Row(tenant_id=key[0], identity=key[2], body=body))
            new.append(key)
    if len(new) == len(keys):
        return Result([Row(complete=True, tenants=None, identities=None)])
    return Result([Row(complete=False, tenants=[key[0] for key in new] or None, identities=[key[2] for key in new] or None)])


def find_in_inbox(session: Session, values: Values) -> Result:
    found = [session.get("inbox", key) for key in _entries(values)]
    return Result([row for row in found if row is not None])


def forget_in_inbox(session: Session, values: Values) -> Result:
    keys = [key for key in dict.fromkeys(_entries(values)) if session.get("inbox", key) is not None]
    session.claim("inbox", keys)
    for key in keys:
        session.write("inbox", key, None)
    return Result(rowcount=len(keys))


# --- outbox and relay -----------------------------------------------------------------------------
_OUTBOX_COLUMNS: Final = {
    "event_id": "event_ids",
    "topic": "topics",
    "partition": "partitions",
    "key": "keys",
    "headers": "headers",
    "value": "contents",
}


def write_outbox(session: Session, values: Values) -> Result:
    columns = [values[name] for name in _OUTBOX_COLUMNS.values()]
    for row in zip(*columns, strict=True):
        number = session.next_value("outbox")
        session.claim("outbox", [(number,)])
        session.write("outbox", (number,), Row(id=number, **dict(zip(_OUTBOX_COLUMNS, row, strict=True))))
    session.notify(outbox_channel(SERVICE))
    return Result()


def delete_and_read_outbox(session: Session, values: Values) -> Result:
    """The reading part sees the rows as they were before."""
    known = set(values["known"])
    unknown = (row for row in session.rows("outbox").values() if row.id not in known)
    oldest = sorted(unknown, key=lambda row: row.id)[: values["rows"]]
    before = accumulate((len(row.value) for row in oldest), initial=0)
    names = ("id", "topic", "partition", "key", "headers", "value")
    taken = [_selected(row, names) for row, size in zip(oldest, before, strict=False) if size < values["bytes"]]
    keys = [(number,) for number in dict.fromkeys(values["published"]) if session.get("outbox", (number,)) is not None]
    session.claim("outbox", keys)
    for key in keys:
        session.write("outbox", key, None)
    return Result(taken)


def claim_lease(session: Session, values: Values) -> Result:
    key = (values["name"],)
    session.claim("relay_lease", [key])
    row = session.get("relay_lease", key)
    if row is not None and row.holder != values["holder"] and not row.expires_at < session.now:
        return Result()
    epoch = 1 if row is None else row.epoch + (row.holder != values["holder"])
    session.write("relay_lease", key, Row(holder=values["holder"], epoch=epoch, expires_at=session.now + values["seconds"]))
    return Result([Row(epoch=epoch)])


def give_up_lease(session: Session, values: Values) -> Result:
    key = (values["name"],)
    row = session.get("relay_lease", key)
    if row is None or row.holder != values["holder"]:
        return Result(rowcount=0)
    session.claim("relay_lease", [key])
    session.write("relay_lease", key, None)
    return Result(rowcount=1)


# --- the handler's own ----------------------------------------------------------------------------
def apply(session: Session, values: Values) -> Result:
    number = session.next_value("effect")
    session.claim("effect", [(number,)])
    session.write("effect", (number,), Row(event_id=values["event_id"], key=values["key"]))
    return Result(rowcount=1)


def lock_key(session: Session, values: Values) -> Result:
    key = (values["key"],)
    session.claim("turn", [key])
    row = session.get("turn", key)
    number = 1 if row is None else row.number + 1
    session.write("turn", key, Row(number=number))
    return Result([Row(number=number)])


def applied(session: Session, _: Values) -> Result:
    return Result([Row(event_id=row.event_id) for row in session.rows("effect").values()])


# --- readers --------------------------------------------------------------------------------------
def set_tenant(session: Session, values: Values) -> Result:
    session.begin()
    return Result([Row(set_config=values["tenant"])])


def seen_positions(session: Session, values: Values) -> Result:
    return Result(
        [
            Row(topic=topic, partition=partition, next_offset=row.next_offset)
            for (consumer, topic, partition), row in session.rows("consumer_position").items()
            if consumer == values["consumer"] and topic in values["topics"]
        ]
    )


def seen_parked(session: Session, values: Values) -> Result:
    """The awaited ones, and the first of each state in each partition that may still have its effect."""
    identities = set(values["identities"])
    places = set(zip(values["topics"], values["partitions"], values["offsets"], strict=True))
    found: dict[Any, Row] = {}
    firsts: set[Any] = set()
    for key, row in sorted(session.rows("parked").items()):
        if key[0] != values["consumer"] or row.tenant_id != values["tenant"]:
            continue
        lane = (row.topic, row.partition, row.state)
        is_first = row.state not in ("refused", "dead") and lane not in firsts
        firsts.add(lane)
        if row.identity in identities or key[1:] in places or is_first:
            found[key] = row
    names = ("topic", "partition", "offset", "identity", "state", "code", "message", "parked_at")
    ordered = sorted(found.values(), key=lambda row: (row.parked_at, row.offset))
    return Result([_selected(row, names) for row in ordered])


def seen_inbox(session: Session, values: Values) -> Result:
    found = [session.get("inbox", (values["tenant"], values["consumer"], identity)) for identity in dict.fromkeys(values["identities"])]
    return Result([Row(identity=row.identity, body=row.body) for row in found if row is not None])


STATEMENTS: Final[Mapping[Any, Callable[[Session, Values], Result]]] = MappingProxyType(
    {
        positions._POSITION: read_position,
        positions._LOCK: lock_position,
        positions._BEGIN: begin_position,
        positions._ADVANCE: advance_position,
        positions._ADVANCE_AND_MARK: advance_and_mark,
        positions._MARK: read_mark,
        positions._SET_MARK: set_mark,
        positions._SET_MARKS: set_marks,
        positions._ADVANCE_ALL: advance_all,
        positions._ADVANCE_ALL_AND_PUBLISH: advance_all_and_publish,
        positions._CLEAR_MARK: clear_mark,
        parked._WRITE: write_parked,
        parked._REMOVE: remove_parked,
        parked._SETTLE: settle_parked,
        parked._LOAD: load_parked,
        parked._BEGIN: begin_parked,
        parked._END: end_parked,
        parked._POSTPONE: postpone_parked,
        parked._RELEASE: release_parked,
        parked._PRUNE: prune_parked,
        inbox._INSERT: enter_inbox,
        inbox._FIND: find_in_inbox,
        inbox._FORGET: forget_in_inbox,
        outbox._INSERT: write_outbox,
        relay._CLAIM: claim_lease,
        relay._GIVE_UP: give_up_lease,
        relay._DELETE_AND_READ: delete_and_read_outbox,
        PING: lambda session, values: Result([Row(number=1)]),
        APPLY: apply,
        LOCK_KEY: lock_key,
        APPLIED: applied,
        database._SET_TENANT: set_tenant,
        freshness._POSITIONS: seen_positions,
        freshness._PARKED: seen_parked,
        freshness._INBOX: seen_inbox,
    }
)
