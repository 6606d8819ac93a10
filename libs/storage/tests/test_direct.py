"""Statements that go to the driver by themselves."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from tessera.storage import DirectStatement
from tessera.storage.direct import begin

pytestmark = pytest.mark.unit


def test_names_become_numbers_each_once_and_casts_stay() -> None:
    statement = DirectStatement("SELECT a::text, 'x' FROM t WHERE b = :second AND c = CAST(:first AS bigint[]) AND d = :second")
    assert statement.sql == "SELECT a::text, 'x' FROM t WHERE b = $1 AND c = CAST($2 AS bigint[]) AND d = $1"
    assert statement.names == ("second", "first")


class DriverError(Exception):
    """What an adapter raises from what its driver did."""


class Refusing:
    """An adapted connection on which no transaction can be started, for the reason it is given."""

    dbapi = SimpleNamespace(Error=DriverError)
    _transaction = None

    def __init__(self, reason: Exception | None) -> None:
        self._reason = reason

    async def _start_transaction(self) -> None:
        raise DriverError("no transaction") from self._reason


@pytest.mark.parametrize(("reason", "raised"), [(ConnectionResetError(), ConnectionResetError), (None, DriverError)])
def test_a_transaction_that_cannot_begin_tells_the_drivers_reason_and_its_chain_ends(
    reason: Exception | None, raised: type[Exception]
) -> None:
    adapted = SimpleNamespace(connection=SimpleNamespace(dbapi_connection=Refusing(reason)))
    connection = cast(AsyncConnection, SimpleNamespace(sync_connection=adapted))
    with pytest.raises(raised) as failure:
        asyncio.run(begin(connection))
    seen: list[BaseException] = []
    error: BaseException | None = failure.value
    while error is not None:
        assert error not in seen, "whoever follows the chain of causes would never return"
        seen.append(error)
        error = error.__cause__ or error.__context__
