"""A model of Postgres, reached where the code under test calls `connection.execute(statement, values)`.

Modelled: transactions in READ COMMITTED (and a snapshot in REPEATABLE READ), row locks held to the end of the transaction, unique
conflicts that wait for whoever holds the key, deadlocks, savepoints, statements that fail the transaction, sequences that are not
transactional, NOTIFY at commit, roll-back when a connection is lost, a commit whose answer is lost, `transaction_timeout`, and a clock.

Every statement of the code under test has one function in `STATEMENTS`; another statement fails loudly. Not modelled: a statement that
waited goes on with the rows that it saw when it began; here it begins anew, and so finds rows that were inserted meanwhile, too.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Final

from simulation.loop import CURRENT, WORLD, Process, SimulationLoop
from sqlalchemy.exc import DBAPIError, NoResultFound

from tessera.storage import Database, DirectStatement

TRANSACTION_TIMEOUT_SECONDS: Final = 30.0
_ABSENT: Final = object()

Row = SimpleNamespace
Key = tuple[Any, ...]
Values = Mapping[str, Any]


class UnknownStatementError(BaseException):
    """A statement without a model: nobody may catch this, the run is worthless."""


class PostgresError(Exception):
    """What the driver would raise."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class MustWaitError(Exception):
    """Somebody else holds a row that this statement needs."""

    def __init__(self, holder: Session) -> None:
        super().__init__("locked")
        self.holder = holder


class Result:
    """What is used of SQLAlchemy's result."""

    def __init__(self, rows: Sequence[Row] = (), rowcount: int | None = None) -> None:
        self._rows = rows
        self.rowcount = len(rows) if rowcount is None else rowcount

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def all(self) -> Sequence[Row]:
        return self._rows

    def scalars(self) -> Result:
        return Result([_first(row) for row in self._rows])

    def one_or_none(self) -> Row | None:
        if len(self._rows) > 1:
            raise AssertionError("more than one row")
        return self._rows[0] if self._rows else None

    def first(self) -> Row | None:
        return self._rows[0] if self._rows else None

    def one(self) -> Row:
        found = self.one_or_none()
        if found is None:
            raise NoResultFound
        return found

    def scalar_one_or_none(self) -> Any:
        found = self.one_or_none()
        return None if found is None else _first(found)

    def scalar_one(self) -> Any:
        return _first(self.one())

    scalar = scalar_one_or_none


def _first(row: Row) -> Any:
    return next(iter(vars(row).values()))


class Session:
    """The server's side of one connection."""

    def __init__(self, server: Server, process: Process | None) -> None:
        self.server = server
        self.process = process
        self.open = True
        self.began: float | None = None
        self.failed = False
        self.waits_for: Session | None = None
        self.request: _Request | None = None
        """What the client asked and has no answer to yet."""
        self.hung_up = False
        """The client has ended the connection; what it had sent may still be read."""
        self.orphaned = False
        """The client is dead; what it had sent is still read, before the end of the stream."""
        self.channels: dict[str, Callable[..., None]] = {}
        self._writes: dict[str, dict[Key, Row | None]] = defaultdict(dict)
        self._undo: list[tuple[str, Key, object]] = []
        self._savepoints: list[tuple[int, int, bool]] = []
        self._locked: list[tuple[str, Key]] = []
        self._notifies: set[str] = set()
        self._snapshot: dict[str, dict[Key, Row]] | None = None
        self.repeatable = False
        if process is not None:
            process.on_death.append(self.orphan)

    # --- what statements use ----------------------------------------------------------------------
    def get(self, table: str, key: Key) -> Row | None:
        """The row as this transaction sees it."""
        own = self._writes[table]
        return own[key] if key in own else self._committed(table).get(key)

    def rows(self, table: str) -> dict[Key, Row]:
        """All rows as this transaction sees them."""
        own = self._writes[table]
        if not own:
            return self._committed(table)
        merged = {**self._committed(table), **own}
        return {key: row for key, row in merged.items() if row is not None}

    def claim(self, table: str, keys: Iterable[Key]) -> None:
        """Locks these keys, in this order, until the end of the transaction. Raises MustWaitError where another transaction has one."""
        locks = self.server.locks[table]
        for key in keys:
            holder = locks.get(key)
            if holder is None:
                locks[key] = self
                self._locked.append((table, key))
            elif holder is not self:
                raise MustWaitError(holder)

    def free(self, table: str, key: Key) -> bool:
        """Whether nobody else has locked the key."""
        return self.server.locks[table].get(key, self) is self

    def look(self, table: str, keys: Iterable[Key], *, written: bool = False) -> None:
        """Waits as an insert does that finds the key held by a transaction that is not over; with `written`, not for a mere lock."""
        for key in keys:
            holder = self.server.locks[table].get(key, self)
            if holder is not self and (not written or key in holder._writes[table]):
                raise MustWaitError(holder)

    def write(self, table: str, key: Key, row: Row | None) -> None:
        """Inserts, updates or (None) deletes. The key must be claimed."""
        own = self._writes[table]
        self._undo.append((table, key, own.get(key, _ABSENT)))
        own[key] = row

    def grown(self) -> set[str]:
        """Tables with a row that this transaction inserted, or deleted and inserted again."""
        return {table for table, key, before in self._undo if before is None or (before is _ABSENT and key not in self._committed(table))}

    def next_value(self, sequence: str) -> int:
        """A sequence's next number, which no roll-back gives back."""
        self.server.sequences[sequence] += 1
        return self.server.sequences[sequence]

    def notify(self, channel: str) -> None:
        """Tells the channel's listeners at commit."""
        self._notifies.add(channel)

    @property
    def now(self) -> float:
        """The time at which the transaction began, as now() has it."""
        return self.server.loop.time() if self.began is None else self.began

    def _committed(self, table: str) -> dict[Key, Row]:
        if self._snapshot is not None:
            return self._snapshot.get(table, {})
        return self.server.tables[table]

    # --- transactions -----------------------------------------------------------------------------
    def begin(self) -> None:
        """Begins a transaction unless one is open."""
        if self.began is None:
            self.began = self.server.loop.time()
            if self.repeatable:
                self._snapshot = {name: dict(rows) for name, rows in self.server.tables.items()}

    def run(self, function: Callable[[Session, Values], Result], values: Values) -> Result:
        """One statement; a failing one fails the transaction. Raises MustWaitError with nothing written."""
        self.begin()
        if self.failed:
            raise PostgresError("25P02", "current transaction is aborted")
        try:
            return function(self, values)
        except PostgresError:
            self.failed = True
            raise

    def run_alone(self, function: Callable[[Session, Values], Result], values: Values) -> Result:
        """One statement in a transaction of its own. Raises MustWaitError with nothing written."""
        try:
            result = self.run(function, values)
        except PostgresError:
            self.rollback()
            raise
        self.commit()
        return result

    def savepoint(self) -> None:
        self.begin()
        self._savepoints.append((len(self._undo), len(self._locked), self.failed))

    def release(self) -> None:
        self._savepoints.pop()

    def rollback_to(self) -> None:
        size, locked, self.failed = self._savepoints.pop()
        while len(self._undo) > size:
            table, key, before = self._undo.pop()
            if before is _ABSENT:
                del self._writes[table][key]
            else:
                self._writes[table][key] = before  # type: ignore[assignment]
        self._unlock(locked)

    def commit(self) -> None:
        """Makes everything visible at once."""
        if self.failed:
            self.rollback()
            raise PostgresError("25P02", "current transaction is aborted")
        for table, writes in self._writes.items():
            committed = self.server.tables[table]
            for key, row in writes.items():
                if row is None:
                    committed.pop(key, None)
                else:
                    committed[key] = row
        self.server.committed(self, self._notifies)
        self._end()

    def rollback(self) -> None:
        """Undoes everything."""
        self._end()

    def _end(self) -> None:
        self.began, self.failed, self._snapshot = None, False, None
        self._writes.clear()
        self._undo.clear()
        self._savepoints.clear()
        self._notifies.clear()
        self._unlock(0)

    def _unlock(self, kept: int) -> None:
        """Gives back all but the oldest `kept` locks."""
        locked, self._locked = self._locked[kept:], self._locked[:kept]
        for table, key in locked:
            del self.server.locks[table][key]
        if locked:
            self.server.released()

    def orphan(self) -> None:
        """The client has died: a request that is on its way arrives, then the connection ends."""
        if self.request is None:
            self.lose()
        else:
            self.orphaned = True

    def lose(self) -> None:
        """The connection is gone: what was not committed never happened."""
        if self.open:
            self.open = False
            self.rollback()
            self.server.sessions.pop(self, None)
            request, self.request = self.request, None
            if request is not None:
                request.fail(lost())


class Server:
    """One Postgres with one schema. `commits` calls back with every session that commits."""

    def __init__(self, loop: SimulationLoop, chance: random.Random, statements: Mapping[Any, Callable[[Session, Values], Result]]) -> None:
        self.loop = loop
        self.chance = chance
        self.statements = statements
        self.up = True
        self.slowness = 0.004
        self.loses_answers = 0.0
        """Share of commits after which the connection is lost before the answer: in doubt."""
        self.tables: dict[str, dict[Key, Row]] = defaultdict(dict)
        self.locks: dict[str, dict[Key, Session]] = defaultdict(dict)
        self.sequences: dict[str, int] = defaultdict(int)
        self.sessions: dict[Session, None] = {}
        self.commits: list[Callable[[Session], None]] = []
        self._waiting: list[Callable[[], None]] = []

    def connect(self) -> Session:
        """A new connection of the current process. Raises ConnectionRefusedError when down."""
        if not self.up:
            raise ConnectionRefusedError("Postgres is away")
        session = Session(self, CURRENT.get())
        self.sessions[session] = None
        return session

    def unknown(self, statement: object) -> UnknownStatementError:
        """The error for a statement without a model, which also ends the run."""
        error = UnknownStatementError(f"no model of the statement: {statement}")
        self.loop.broken.append({"message": "unknown statement", "exception": error})
        return error

    def stop(self) -> None:
        """A crash: every connection is lost; what was committed stays."""
        self.up = False
        for session in list(self.sessions):
            if session.request is not None and session.request.commit and self.chance.random() < 0.5:
                session.commit()
            session.lose()

    def start(self) -> None:
        """It takes connections again."""
        self.up = True

    def committed(self, session: Session, channels: Iterable[str]) -> None:
        """Tells who observes, and who listens."""
        for tell in self.commits:
            tell(session)
        for channel in sorted(channels):
            for listening in self.sessions:
                if channel in listening.channels and listening.process is not None and listening.process.alive:
                    self.loop.call_later(self.latency(), listening.channels[channel], context=_context_of(listening.process))

    def released(self) -> None:
        """Some locks are free: whoever waits tries again."""
        waiting, self._waiting = self._waiting, []
        for retry in waiting:
            self.loop.call_soon(retry, context=WORLD)

    def latency(self) -> float:
        """Seconds of one round trip."""
        return self.chance.random() * self.slowness

    async def ask(self, session: Session, work: Callable[[], Any], *, commit: bool = False) -> Any:
        """One round trip. Raises DBAPIError when the connection is lost, before or after the request had its effect."""
        process = CURRENT.get()
        if process is not None and not process.alive:
            await self.loop.create_future()  # the dead ask nothing
        if not session.open or session.hung_up:
            raise lost()
        request = _Request(session, work, commit=commit)
        session.request = request
        self.loop.call_later(self.latency(), request.arrive, context=WORLD)
        try:
            return await request.answer
        except asyncio.CancelledError:
            # The driver ends the connection. What was sent may still have its effect, a commit too.
            session.hung_up = True
            self.loop.call_later(self.latency(), session.lose, context=WORLD)
            raise
        finally:
            if session.request is request:
                session.request = None

    def wait(self, request: _Request, holder: Session) -> None:
        """Has the request arrive again when locks are given back; breaks a circle of waiting."""
        session = request.session
        session.waits_for = seen = holder
        while seen.waits_for is not None:
            seen = seen.waits_for
            if seen is session:
                session.waits_for, session.failed = None, True
                request.fail(DBAPIError("", {}, PostgresError("40P01", "deadlock detected"), hide_parameters=True))
                return
        self._waiting.append(request.arrive)
        if holder.began is not None:
            self.loop.call_at(holder.began + TRANSACTION_TIMEOUT_SECONDS, _expire, holder, holder.began, context=WORLD)


class _Request:
    """One request on its way to the server, and its answer."""

    def __init__(self, session: Session, work: Callable[[], Any], *, commit: bool) -> None:
        self.session = session
        self.commit = commit
        self.answer = session.server.loop.create_future()
        self._work = work

    def fail(self, error: Exception) -> None:
        """The client gets an error."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def arrive(self) -> None:
        """The server does it, or waits for a lock."""
        session = self.session
        session.waits_for = None
        if not session.open:
            self.fail(lost())
            return
        try:
            self._finish(self._work())
        except MustWaitError as locked:
            session.server.wait(self, locked.holder)
            return
        except PostgresError as error:
            self.fail(DBAPIError("", {}, error, hide_parameters=True))
        if session.orphaned:
            session.lose()

    def _finish(self, result: Any) -> None:
        server = self.session.server
        if self.commit and server.loses_answers and server.chance.random() < server.loses_answers:
            self.session.lose()
        elif not self.answer.done():
            self.answer.set_result(result)


def _expire(holder: Session, began: float) -> None:
    """`transaction_timeout`: the same transaction is still open."""
    if holder.began == began:
        holder.lose()


def _context_of(process: Process) -> Any:
    context = WORLD.copy()
    context.run(CURRENT.set, process)
    return context


def lost() -> Exception:
    return DBAPIError("", {}, PostgresError("08006", "connection lost"), hide_parameters=True, connection_invalidated=True)


# --- what SQLAlchemy and asyncpg look like --------------------------------------------------------------------------------------------
class SimulatedConnection:
    """Stands where an AsyncConnection does."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._session: Session | None = None
        self._in_transaction = False

    async def start(self) -> SimulatedConnection:
        """Connects."""
        await asyncio.sleep(0)
        self._session = self._server.connect()
        return self

    @property
    def session(self) -> Session:
        assert self._session is not None
        return self._session

    @property
    def sync_connection(self) -> Any:
        """What SQLAlchemy has below, as far as storage looks there."""
        adapted = SimpleNamespace(
            _transaction=self.session.began, _start_transaction=self._start_transaction, dbapi=SimpleNamespace(Error=())
        )
        return SimpleNamespace(connection=SimpleNamespace(driver_connection=SimulatedDriver(self), dbapi_connection=adapted))

    async def _start_transaction(self) -> None:
        await self._server.ask(self.session, self.session.begin)

    invalidated = False

    async def invalidate(self) -> None:
        """The driver has met the end of the connection."""

    async def execution_options(self, **options: Any) -> SimulatedConnection:
        self.session.repeatable = options.get("isolation_level") == "REPEATABLE READ"
        return self

    async def execute(self, statement: Any, values: Any = None) -> Result:
        function = _nothing if str(statement) == "SELECT 1" else self._server.statements.get(statement)
        if function is None:
            raise self._server.unknown(statement)
        return await self.run(function, values or {})

    async def run(self, function: Callable[[Session, Values], Result], values: Values) -> Result:
        """In the transaction, or by itself where none was begun."""
        session, alone = self.session, not self._in_transaction
        run = session.run_alone if alone else session.run
        result: Result = await self._server.ask(session, lambda: run(function, values), commit=alone)
        return result

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        session = self.session
        self._in_transaction = True
        try:
            yield
        except BaseException:
            if session.open and not session.hung_up and session.began is not None:
                await self._server.ask(session, session.rollback)
            raise
        if session.began is not None or not session.open:
            await self._server.ask(session, session.commit, commit=True)

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        session = self.session
        await self._server.ask(session, session.savepoint)
        try:
            yield
        except BaseException:
            if session.open and not session.hung_up:
                await self._server.ask(session, session.rollback_to)
            raise
        await self._server.ask(session, session.release)

    async def close(self) -> None:
        if self._session is not None and not self._session.hung_up:
            self._session.lose()


class SimulatedDriver:
    """Stands where asyncpg's connection does that SQLAlchemy uses."""

    def __init__(self, connection: SimulatedConnection) -> None:
        self._connection = connection

    def is_closed(self) -> bool:
        return not self._connection.session.open

    async def fetch(self, sql: str, *values: Any) -> list[Mapping[str, Any]]:
        server = self._connection._server
        found = next(
            ((known, function) for known, function in server.statements.items() if isinstance(known, DirectStatement) and known.sql == sql),
            None,
        )
        if found is None:
            raise server.unknown(sql)
        statement, function = found
        result = await self._connection.run(function, dict(zip(statement.names, values, strict=True)))
        return [vars(row) for row in result]


def _nothing(session: Session, values: Values) -> Result:
    """The question whether Postgres answers."""
    return Result([Row(one=1)])


class SimulatedListener:
    """Stands where an asyncpg connection does that listens."""

    def __init__(self, server: Server) -> None:
        self._session = server.connect()

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        session = self._session
        await session.server.ask(session, lambda: session.channels.__setitem__(channel, callback))

    def is_closed(self) -> bool:
        return not self._session.open

    async def close(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        self._session.lose()


class SimulatedDatabase(Database):
    """The real Database, breaker and translation of errors included, on a simulated server."""

    def __init__(self, service: str, settings: Any, server: Server) -> None:
        super().__init__(service, settings)
        self._server = server
        self.breaker._clock = server.loop.time

    def _engine(self, role: Any) -> Any:
        return SimpleNamespace(connect=lambda: SimulatedConnection(self._server))

    async def check(self) -> None:
        async with self.transaction() as connection:
            await connection.execute(next(statement for statement in self._server.statements if str(statement) == "SELECT 1"))

    async def _opened(self, **_: Any) -> Any:
        return SimulatedListener(self._server)
