"""What storage raises besides SQLAlchemy's errors for statements that are wrong.

RetryableError
├── StorageUnavailableError   no connection, or it was lost; counted by the breaker
│   └── ObjectsUnavailableError   the same of the object store
├── StorageConflictError      deadlock, serialisation failure, lock not available: run the transaction again
└── StorageTimeoutError       a statement or transaction was longer than allowed
InvalidError
└── ObjectNotFoundError       the object store has nothing under the key
"""

from traceback import walk_tb

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tessera.contracts.errors import InvalidError, RetryableError


class StorageUnavailableError(RetryableError):
    """The store cannot be reached, ended the connection, or has no connection free."""

    code = "storage_unavailable"


class ObjectsUnavailableError(StorageUnavailableError):
    """The object store cannot be reached or failed; Postgres is none the worse for it."""


class StorageConflictError(RetryableError):
    """The transaction was rolled back because of another one; the same transaction may succeed now."""

    code = "storage_conflict"


class StorageTimeoutError(RetryableError):
    """Postgres cancelled the statement, or ended the transaction, because it took longer than the role may."""

    code = "storage_timeout"


class ObjectNotFoundError(InvalidError):
    """Nothing is stored under the key."""

    def __init__(self, key: str) -> None:
        super().__init__("object_not_found", f"no object is stored under {key!r}")


_CONFLICTS = frozenset({"40001", "40P01", "55P03"})
_TIMEOUTS = frozenset({"57014", "25P03", "25P04"})
READ_ONLY = "25006"
"""Where the transaction itself is not read-only: the server takes no writes, as a standby does after a failover."""
# Class 08 is the connection itself; the rest say that the server starts, ends, is full, cannot write to its disk,
# takes no writes, or refuses the log-in.
_UNAVAILABLE = frozenset({"57P01", "57P02", "57P03", "57P05", "53300", "53400", "53100", "58030", READ_ONLY, "28P01", "28000", "3D000"})


def translated(error: Exception) -> RetryableError | None:
    """The error of ours that a driver's error means; None when the statement itself is at fault, or it is no driver's error."""
    if isinstance(error, PoolTimeoutError):
        return StorageUnavailableError("no connection to Postgres became free in time")
    if isinstance(error, TimeoutError) and _raised_by_driver(error):
        return StorageUnavailableError("Postgres did not answer in time")
    if isinstance(error, asyncpg.InternalClientError):
        return StorageUnavailableError("Postgres has just ended the session")  # asyncpg has read the reason, and not the end yet
    if not isinstance(error, DBAPIError | asyncpg.PostgresError | asyncpg.InterfaceError):
        return None
    return _meaning(error, sqlstate(error) or "")


def _meaning(error: Exception, state: str) -> RetryableError | None:
    if state in _CONFLICTS:
        return StorageConflictError(f"Postgres rolled the transaction back ({state})")
    if state in _TIMEOUTS:
        return StorageTimeoutError(f"Postgres ended what took too long ({state})")
    if state in _UNAVAILABLE or state.startswith("08") or _connection_lost(error):
        return StorageUnavailableError(f"Postgres cannot be used now ({state or 'connection lost'})")
    return None


def _raised_by_driver(error: Exception) -> bool:
    """True for asyncpg's own plain TimeoutError: a silent server. A caller's time-out around the same call has no frame of the driver."""
    frames = walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith("asyncpg.") for frame, _ in frames)


def _connection_lost(error: Exception) -> bool:
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or "connection is closed" in str(error.orig) or "connection was closed" in str(error.orig)
    return isinstance(error, asyncpg.InterfaceError) and "closed" in str(error)


def sqlstate(error: BaseException) -> str | None:
    """The five characters by which Postgres names the error (appendix A of its manual), where it came from Postgres.

    A session that Postgres ends (a time-out, a shutdown) is first of all a lost connection to asyncpg, with Postgres's reason as the cause.
    """
    state, cause = getattr(error, "sqlstate", None), error.orig if isinstance(error, DBAPIError) else error.__cause__
    deeper = sqlstate(cause) if cause is not None else None
    return deeper or (state if isinstance(state, str) else None)
