"""How many calls there were, each counted once."""

from typing import Any

import pytest

from tessera.contracts.errors import RetryableError
from tessera.gateway.domain.keys import Principal
from tessera.gateway.handlers.calls import CLIENT_LEFT, Calls

pytestmark = pytest.mark.unit

ONE = Principal("t", "k", frozenset())


def counted(sums: Any) -> list[tuple[str, str, int, int]]:
    return [(each.tenant_id, each.operation, requests, errors) for rows in sums.added.values() for each, requests, errors in rows]


async def test_calls_are_counted_at_the_edge_with_those_that_fail(desk: Any) -> None:
    async with desk.client() as client:
        await client.get("/v1/models")
        await client.get("/v1/models/unknown")
        await client.get("/v1/models", headers={"authorization": ""})
        await desk.rooms.calls.once()
        told = (await client.get("/v1/usage/calls")).json()
    assert counted(desk.rooms.call_sums) == [("default", "GET /v1/models", 1, 0), ("default", "GET /v1/models/{model:path}", 1, 1)]
    assert [(row["requests"], row["errors"]) for row in told["data"]] == [(1, 0), (1, 1)]


async def test_what_may_have_been_added_is_handed_over_under_the_same_id(desk: Any) -> None:
    sums = desk.rooms.call_sums
    calls = Calls(sums)
    calls.note(ONE, "GET /a", 200)
    sums.troubles = [RetryableError("whether it was committed is not known")]
    with pytest.raises(RetryableError):
        await calls.once()
    calls.note(ONE, "GET /a", 500)
    await calls.once()
    await calls.once()
    await calls.once()
    assert counted(sums) == [("t", "GET /a", 1, 0), ("t", "GET /a", 1, 1)]


async def test_a_client_that_left_made_no_error(desk: Any) -> None:
    calls = Calls(desk.rooms.call_sums)
    calls.note(ONE, "GET /a", CLIENT_LEFT)
    await calls.once()
    assert counted(desk.rooms.call_sums) == [("t", "GET /a", 1, 0)]
