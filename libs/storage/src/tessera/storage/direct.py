"""Statements of the delivery path, sent to asyncpg without SQLAlchemy in between.

SQLAlchemy more than doubles what a statement costs (`tests/bench/bus/statements.py`), and a batch has four or five, however few events
it holds. Everything else goes through SQLAlchemy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

_PARAMETER: Final = re.compile(r"(?<![:\w]):([a-z_]+)")


class DirectStatement:
    """SQL with `:name` parameters, as SQLAlchemy's `text` has them. Prepared once per connection.

    Its methods take the driver's connection and the values by name; rows give their columns by name, `row["id"]`. They raise asyncpg's
    errors, which `Database` translates where the transaction ends.
    """

    def __init__(self, sql: str) -> None:
        names: list[str] = []

        def numbered(found: re.Match[str]) -> str:
            if found[1] not in names:
                names.append(found[1])
            return f"${names.index(found[1]) + 1}"

        self.sql = _PARAMETER.sub(numbered, sql)
        self.names = tuple(names)

    def __str__(self) -> str:
        return self.sql

    async def rows(self, driver: asyncpg.Connection, values: Mapping[str, object]) -> Sequence[Mapping[str, Any]]:
        """All rows of the result."""
        return cast(Sequence[Mapping[str, Any]], await driver.fetch(self.sql, *[values[name] for name in self.names]))

    async def row(self, driver: asyncpg.Connection, values: Mapping[str, object]) -> Mapping[str, Any]:
        """The one row of a statement that always gives one."""
        (found,) = await self.rows(driver, values)
        return found


def driver_of(connection: AsyncConnection) -> asyncpg.Connection:
    """The driver's connection behind a transaction of `Database`: what is sent there is part of that transaction."""
    pooled = connection.sync_connection
    if pooled is None:
        raise RuntimeError("the connection was not started")
    return pooled.connection.driver_connection


async def begin(connection: AsyncConnection) -> None:
    """Sends BEGIN now. SQLAlchemy would with its first statement, which the driver's own must not come before. Raises asyncpg's errors."""
    adapted: Any = cast(Any, connection.sync_connection).connection.dbapi_connection
    if adapted._transaction is not None:
        return
    failure: BaseException | None = None
    try:
        await adapted._start_transaction()
    except adapted.dbapi.Error as error:
        failure = error.__cause__ or error
    if failure is not None:  # raised in the handler it would be its own cause's cause, and whoever follows the chain would never return
        raise failure
