"""The model of Postgres against the real one: the same operations, chosen by chance, in two transactions at once; answers are compared."""

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from simulation.postgres import MustWaitError, PostgresError, Result, Server, Session, Values
from simulation.statements import APPLIED, APPLY, LOCK_KEY, SERVICE, STATEMENTS
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.bus import freshness, inbox, outbox, parked, positions, relay
from tessera.storage import Database, DirectStatement, database, direct, driver_of
from tessera.storage.errors import sqlstate
from tessera.testkit import PostgresDatabase

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STORIES = 100
STEPS = 30
TABLES_OF_A_STORY = 3
"""Few, so that the two transactions meet."""
PATIENCE_SECONDS = 20.0
_INSERTS = re.compile(r"(WITH \w+ AS \()?INSERT")
TABLES = ("inbox", "outbox", "consumer_position", "batch_mark", "parked", "relay_lease", "effect", "turn")
HANDLERS_OWN = (
    f"CREATE TABLE {SERVICE}.effect (position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, event_id text NOT NULL, key text NOT NULL)",
    f"CREATE TABLE {SERVICE}.turn (key text PRIMARY KEY, number integer NOT NULL)",
    f"GRANT SELECT, INSERT, UPDATE, DELETE ON {SERVICE}.effect, {SERVICE}.turn TO tessera_{SERVICE}_worker",
)


class Ticks:
    """A clock on which every transaction begins at a time of its own."""

    def __init__(self) -> None:
        self._now = 0.0

    def time(self) -> float:
        self._now += 0.000_001
        return self._now


@dataclass
class Pair:
    """One connection to each."""

    modelled: Session
    real: AsyncConnection
    pid: int
    waiting: tuple[Any, Values, asyncio.Task[Any]] | None = None
    savepoint: Any = None
    """One at most: who waits for what was done in a savepoint inside another may wait for the whole transaction, and may not."""


# --- operations -----------------------------------------------------------------------------------------------------------------------
def place(chance: random.Random) -> dict[str, Any]:
    return {"consumer": "c", "topic": "t", "partition": chance.randrange(2)}


def identities(chance: random.Random) -> dict[str, Any]:
    count = chance.randint(1, 3)
    return {"consumer": "c", "tenants": ["a"] * count, "identities": [bytes([chance.randrange(3)] * 16) for _ in range(count)]}


def entered(chance: random.Random) -> dict[str, Any]:
    values = identities(chance)
    return {**values, "bodies": [bytes([chance.randrange(2)] * 16) for _ in values["tenants"]]}


def mark(chance: random.Random) -> dict[str, Any]:
    first = chance.randrange(3)
    return {**place(chance), "stored": chance.randrange(3), "first": first, "last": first + 1, "attempts": chance.randint(1, 3)}


def shared(chance: random.Random) -> dict[str, Any]:
    """Of one partition or of both, in any order."""
    partitions = chance.sample(range(2), chance.randint(1, 2))
    places = {"consumer": "c", "on_topics": ["t"] * len(partitions), "on_partitions": partitions}
    firsts = [chance.randrange(3) for _ in partitions]
    return {**places, "stored": [chance.randrange(3) for _ in firsts], "firsts": firsts, "lasts": [first + 1 for first in firsts]}


def moved(chance: random.Random) -> dict[str, Any]:
    """Some mark what follows, some take the mark away."""
    values = shared(chance)
    firsts = [chance.choice((None, first)) for first in values["firsts"]]
    lasts = [None if first is None else first + 1 for first in firsts]
    return {**values, "firsts": firsts, "lasts": lasts, "next_offsets": [chance.randrange(3) for _ in firsts]}


def outgoing(chance: random.Random) -> dict[str, Any]:
    count = chance.randint(1, 3)
    return {
        "event_ids": [UUID(int=chance.getrandbits(128)) for _ in range(count)],
        "topics": [chance.choice(("x", "y")) for _ in range(count)],
        "partitions": [chance.choice((None, 1)) for _ in range(count)],
        "keys": [chance.choice((None, b"k")) for _ in range(count)],
        "headers": ['[["name", "value"]]'] * count,
        "contents": [b"{}"] * count,
    }


def relayed(chance: random.Random) -> dict[str, Any]:
    limits = {"rows": chance.choice((2, 500)), "bytes": chance.choice((3, 1_000))}
    return {"published": _some_ids(chance), "known": _some_ids(chance), **limits}


def _some_ids(chance: random.Random) -> list[int]:
    return [chance.randint(1, 6) for _ in range(chance.randint(0, 3))]


def lease(chance: random.Random) -> dict[str, Any]:
    return {"name": "n", "holder": chance.choice("ab"), "seconds": chance.choice((0.0, 1_000.0))}


def awaited(chance: random.Random) -> dict[str, Any]:
    places = {"topics": ["t"], "partitions": [chance.randrange(2)], "offsets": [chance.randrange(3)]}
    return {"consumer": "c", "tenant": "a", "identities": identities(chance)["identities"], **places}


def noted(chance: random.Random) -> dict[str, Any]:
    offsets = chance.sample(range(3), chance.randint(1, 2))
    count = len(offsets)
    states = [chance.choice(("waiting", "waiting", "stuck", "refused", "dead", "delayed")) for _ in offsets]
    holds = [state in ("waiting", "stuck") for state in states]
    return {
        "consumer": "c",
        "topics": ["t"] * count,
        "partitions": [chance.randrange(2)] * count,
        "offsets": offsets,
        "tenants": ["a"] * count,
        "identities": [bytes([chance.randrange(3)] * 16) for _ in offsets],
        "keys": [b"k"] * count,
        "states": states,
        "attempts": [chance.randrange(3) for _ in offsets],
        "dues": [0.0] * count,
        "codes": [chance.choice(("x", "y")) for _ in offsets],
        "messages": ["m"] * count,
        "traces": [None] * count,
        "milliseconds": [1 if held else None for held in holds],
        "headers": ['[["name", "value"]]' if held else None for held in holds],
        "contents": [b"{}" if held else None for held in holds],
    }


def parked_place(chance: random.Random) -> dict[str, Any]:
    return {**place(chance), "offset": chance.randrange(3)}


def postponed(chance: random.Random) -> dict[str, Any]:
    explained = chance.random() < 0.5
    told = {"code": "z", "message": "n"} if chance.random() < 0.5 else {"code": None, "message": None}
    state = chance.choice(("waiting", "stuck"))
    return {
        **parked_place(chance),
        **told,
        "failures": chance.randint(1, 2),
        "back": int(explained),
        "spent": int(explained),
        "state": state,
        "due_in": 0.0,
    }


def _one_place(chance: random.Random) -> dict[str, Any]:
    return {"topics": "t", "partitions": chance.randrange(2), "offsets": chance.randrange(3)}


PARKED_CHOICES: dict[Any, Callable[[random.Random], dict[str, Any]]] = {
    positions._LOCK: place,
    parked._WRITE: noted,
    parked._REMOVE: lambda chance: {
        "consumer": "c",
        "topics": ["t"],
        "partitions": [chance.randrange(2)],
        "offsets": [chance.randrange(3)],
    },
    parked._SETTLE: identities,
    parked._LOAD: place,
    parked._BEGIN: parked_place,
    parked._END: lambda chance: {**parked_place(chance), "failures": chance.randint(0, 2)},
    parked._POSTPONE: postponed,
    parked._RELEASE: lambda chance: {**parked_place(chance), "code": "retried"},
    parked._PRUNE: lambda chance: {"age": chance.choice((0.0, 1_000.0)), "rows": 10},
}

CHOICES: dict[Any, Callable[[random.Random], dict[str, Any]]] = {
    positions._POSITION: place,
    positions._BEGIN: lambda chance: {**place(chance), "next_offset": chance.randrange(3)},
    positions._ADVANCE: lambda chance: {**place(chance), "stored": chance.randrange(3), "next_offset": chance.randrange(3)},
    positions._ADVANCE_AND_MARK: lambda chance: {**mark(chance), "next_offset": chance.randrange(3)},
    positions._MARK: place,
    positions._SET_MARK: mark,
    positions._SET_MARKS: shared,
    positions._ADVANCE_ALL: moved,
    positions._ADVANCE_ALL_AND_PUBLISH: lambda chance: {**moved(chance), **outgoing(chance)},
    positions._CLEAR_MARK: place,
    inbox._INSERT: entered,
    inbox._FIND: identities,
    inbox._FORGET: identities,
    outbox._INSERT: outgoing,
    relay._DELETE_AND_READ: relayed,
    relay._CLAIM: lease,
    relay._GIVE_UP: lambda chance: {"name": "n", "holder": chance.choice("ab")},
    APPLY: lambda chance: {"event_id": "e", "key": "k"},
    LOCK_KEY: lambda chance: {"key": chance.choice("pq")},
    **PARKED_CHOICES,
    APPLIED: lambda _: {},
    database._SET_TENANT: lambda _: {"tenant": "a"},
    freshness._POSITIONS: lambda _: {"consumer": "c", "topics": ["t"]},
    freshness._PARKED: awaited,
    freshness._INBOX: lambda chance: {**identities(chance), "tenant": "a"},
}


def test_every_statement_of_the_model_is_compared() -> None:
    assert set(CHOICES) == {statement for statement in STATEMENTS if str(statement) != "SELECT 1"}


# --- the two servers ------------------------------------------------------------------------------------------------------------------
class Story:
    """One sequence of operations."""

    def __init__(self, seed: int, pairs: Sequence[Pair], admin: asyncpg.Connection) -> None:
        self.chance = random.Random(f"conformance {seed}")
        elsewhere = self.chance.sample(TABLES, len(TABLES) - TABLES_OF_A_STORY)
        self.statements = [statement for statement in CHOICES if not any(table in str(statement) for table in elsewhere)]
        self.pairs = pairs
        self.admin = admin
        self.told = [f"seed {seed}"]
        self.waits = 0
        self.answers = Counter[Any]()

    async def run(self) -> None:
        for _ in range(STEPS):
            await self._step(self.chance.choice([pair for pair in self.pairs if pair.waiting is None]))
            await self._answer_waiting()
        for pair in sorted(self.pairs, key=lambda pair: pair.waiting is not None):
            await self._end(pair, commit=self.chance.random() < 0.5)

    async def _step(self, pair: Pair) -> None:
        # While one waits for the other, the other only ends: which rows a waiting statement has locked already, the plan decides.
        statements = () if any(other.waiting for other in self.pairs) else ("statement",) * 16 + ("savepoint",) * 2
        kind = self.chance.choice((*statements, "release", "back", "commit", "rollback"))
        if kind == "statement":
            statement = self.chance.choice(self.statements)
            await self._execute(pair, statement, CHOICES[statement](self.chance))
        elif kind in ("commit", "rollback"):
            await self._end(pair, commit=kind == "commit")
        elif kind == "savepoint" and pair.savepoint is None:
            self._tell(pair, "savepoint")
            pair.modelled.savepoint()
            pair.savepoint = await pair.real.begin_nested()
        elif kind in ("release", "back") and pair.savepoint is not None:
            await self._leave_savepoint(pair, release=kind == "release")

    async def _leave_savepoint(self, pair: Pair, *, release: bool) -> None:
        self._tell(pair, "release" if release else "rollback to savepoint")
        nested, pair.savepoint = pair.savepoint, None
        if release:
            pair.modelled.release()
            await nested.commit()
        else:
            pair.modelled.rollback_to()
            await nested.rollback()

    async def _execute(self, pair: Pair, statement: Any, values: Values) -> None:
        function = STATEMENTS[statement]
        self._tell(pair, f"{function.__name__} {dict(values)}")
        try:
            expected = modelled(pair.modelled, function, values)
        except MustWaitError:
            await self._expect_waiting(pair, statement, values)
            return
        found = await self._in_time(real(pair.real, statement, values))
        self._compare(statement, expected, found)

    async def _expect_waiting(self, pair: Pair, statement: Any, values: Values) -> None:
        task = asyncio.create_task(real(pair.real, statement, values))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not task.done() and not await self._waits(pair):
                pass
        assert not task.done(), self._difference("waiting for the other transaction", task.result())
        pair.waiting = (statement, values, task)
        self.waits += 1

    async def _waits(self, pair: Pair) -> bool:
        return bool(await self.admin.fetchval("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1", pair.pid))

    async def _end(self, pair: Pair, *, commit: bool) -> None:
        self._tell(pair, "commit" if commit else "rollback")
        grown = pair.modelled.grown() if commit else set()
        if commit:
            pair.modelled.commit()
            await pair.real.commit()
        else:
            pair.modelled.rollback()
            await pair.real.rollback()
        pair.savepoint = None
        await self._answer_waiting(grown)

    async def _answer_waiting(self, grown: Set[str] = frozenset()) -> None:
        """Who waits no more has the same answer from both, unless it may have missed what was inserted meanwhile into a `grown` table."""
        for pair in self.pairs:
            if pair.waiting is None:
                continue
            statement, values, task = pair.waiting
            try:
                expected = modelled(pair.modelled, STATEMENTS[statement], values)
            except MustWaitError:
                continue
            pair.waiting = None
            found = await self._in_time(task)
            if _INSERTS.match(str(statement)) or not any(table in str(statement) for table in grown):
                self._compare(statement, expected, found)
            else:
                await self._end(pair, commit=False)

    async def _in_time(self, asked: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(asked, PATIENCE_SECONDS)
        except TimeoutError:
            raise AssertionError(self._difference("an answer", "nothing: it waits")) from None

    def _tell(self, pair: Pair, what: str) -> None:
        self.told.append(f"{self.pairs.index(pair)}: {what}")

    def _compare(self, statement: Any, expected: object, found: object) -> None:
        assert found == expected, self._difference(expected, found)
        self.answers[statement] += 1

    def _difference(self, expected: object, found: object) -> str:
        return "\n".join([*self.told, f"the model says {expected}", f"Postgres says  {found}"])


def modelled(session: Session, function: Callable[[Session, Values], Result], values: Values) -> Any:
    """Rows in any order, and how many; or the error."""
    try:
        result = session.run(function, values)
    except PostgresError as error:
        return error.sqlstate
    return sorted((_plain(vars(row)) for row in result), key=repr), result.rowcount


async def real(connection: AsyncConnection, statement: Any, values: Values) -> Any:
    if isinstance(statement, DirectStatement):
        return await _directly(connection, statement, values)
    try:
        result = await connection.execute(statement, values)
    except DBAPIError as error:
        return sqlstate(error)
    rows = sorted((_plain(dict(row._mapping)) for row in result), key=repr) if result.returns_rows else []
    return rows, len(rows) if result.returns_rows else result.rowcount


async def _directly(connection: AsyncConnection, statement: DirectStatement, values: Values) -> Any:
    if not connection.in_transaction():
        await connection.begin()
    await direct.begin(connection)
    try:
        rows = await statement.rows(driver_of(connection), values)
    except asyncpg.PostgresError as error:
        return sqlstate(error)
    return sorted((_plain(dict(row)) for row in rows), key=repr), len(rows)


def _plain(row: dict[str, Any]) -> tuple[Any, ...]:
    """Names and values, without times, which are different clocks'."""
    return tuple((name, None if name in ("parked_at", "due_in") else value) for name, value in sorted(row.items()))


@pytest.fixture(scope="module")
def migrated(postgres_database: Callable[..., PostgresDatabase]) -> PostgresDatabase:
    return postgres_database(SERVICE)


@pytest.fixture
async def admin(migrated: PostgresDatabase) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(migrated.admin_url)
    for statement in HANDLERS_OWN:
        await connection.execute(statement)
    yield connection
    await connection.close()


@pytest.fixture
async def connections(migrated: PostgresDatabase, admin: asyncpg.Connection) -> AsyncIterator[list[tuple[AsyncConnection, int]]]:
    pool = Database(SERVICE, migrated.settings(SERVICE))
    opened = [await pool._connected("worker") for _ in range(2)]
    pids = [(await each.execute(text("SELECT pg_backend_pid()"))).scalar_one() for each in opened]
    for each in opened:
        await each.rollback()
    yield list(zip(opened, pids, strict=True))
    for each in opened:
        await each.close()
    await pool.close()


async def test_the_model_answers_as_postgres_does(connections: list[tuple[AsyncConnection, int]], admin: asyncpg.Connection) -> None:
    waits, answers, first = 0, Counter[Any](), int(os.environ.get("SIMULATION_SEED", "0"))
    for seed in range(first, first + STORIES):
        server = Server(Ticks(), random.Random(seed), STATEMENTS)  # type: ignore[arg-type]
        pairs = [Pair(Session(server, None), connection, pid) for connection, pid in connections]
        story = Story(seed, pairs, admin)
        await story.run()
        waits += story.waits
        answers += story.answers
        await _compare_what_is_left(Session(server, None), connections[0][0])
        await admin.execute("TRUNCATE " + ", ".join(f"{SERVICE}.{table}" for table in TABLES) + " RESTART IDENTITY")
    print(f"seeds from {first}: {answers.total()} answers compared, {waits} waits")
    assert waits > STORIES / 4, "the two have hardly met"
    assert set(answers) == set(CHOICES), "not every statement was compared"


async def _compare_what_is_left(session: Session, connection: AsyncConnection) -> None:
    whole = {"consumer": "c", "tenants": ["a"] * 3, "identities": [bytes([number] * 16) for number in range(3)]}
    looks: list[tuple[Any, Values]] = [
        (relay._DELETE_AND_READ, {"published": [], "known": [], "rows": 500, "bytes": 1_000}),
        (inbox._FIND, whole),
    ]
    looks += [
        (statement, {"consumer": "c", "topic": "t", "partition": number})
        for number in range(2)
        for statement in (positions._POSITION, positions._MARK)
    ]
    for statement, values in looks:
        assert await real(connection, statement, values) == modelled(session, STATEMENTS[statement], values), str(statement)
    await connection.rollback()
