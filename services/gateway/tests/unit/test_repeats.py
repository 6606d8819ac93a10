"""The same request again, by its Idempotency-Key."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from tessera.contracts.errors import RetryableError
from tessera.contracts.events import TokenizationCompleted
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.repeats import answered
from tessera.gateway.ports import Repeat
from tessera.gateway.routes.application import api_routes
from tessera.gateway.routes.repeats import keeps_answers

pytestmark = pytest.mark.unit

REPEAT = Repeat("POST /v1/x", "k", b"d" * 16)
PATIENCE = timedelta(milliseconds=300)
BODY = {"text": "Hello", "encoding": "o200k_base"}
TOKENS = TokenizationCompleted(operation="encode", encoding="o200k_base", tokens=(1, 2), text="Hello", composition_id="ab" * 32)


def test_every_post_takes_the_header() -> None:
    posts = [route for route in api_routes() if "POST" in (route.methods or ())]
    by_ids = {route.path for route in posts if not keeps_answers(route)}
    assert by_ids == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/memories",
        "/v1/memories/batch",
        "/v1/retention/sweeps",
        "/v1/datasets",
        "/v1/validations",
    }


async def test_it_is_done_once_and_answered_twice(desk: Any) -> None:
    desk.log.answers = [TOKENS]
    async with desk.client() as client:
        first, second = [await client.post("/v1/tokenize", json=BODY, headers={"Idempotency-Key": "a"}) for _ in range(2)]
        other = await client.post("/v1/tokenize", json={**BODY, "text": "Bye"}, headers={"Idempotency-Key": "a"})
    assert (first.status_code, second.status_code, first.json()) == (200, 200, second.json())
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"


async def test_what_fails_may_be_tried_again(desk: Any) -> None:
    desk.log.answers = [ApiError(503, "dependency_unavailable", "away"), TOKENS]
    async with desk.client() as client:
        statuses = [(await client.post("/v1/tokenize", json=BODY, headers={"Idempotency-Key": "a"})).status_code for _ in range(2)]
        wrong = await client.post("/v1/tokenize", json={"nothing": 1}, headers={"Idempotency-Key": "b"})
    assert (statuses, wrong.status_code) == ([503, 200], 400)
    assert [key for _, _, key in desk.rooms.answers.rows] == ["a"]


async def test_another_tenant_or_path_has_keys_of_its_own(desk: Any) -> None:
    desk.log.answers = [TOKENS, TOKENS]
    async with desk.client() as client, desk.client(desk.new_key("inference", tenant_id="other")) as stranger:
        for asker in (client, stranger):
            assert "idempotent-replayed" not in (await asker.post("/v1/tokenize", json=BODY, headers={"Idempotency-Key": "a"})).headers


async def test_a_secret_is_not_kept(desk: Any) -> None:
    async with desk.client() as client:
        await client.post("/v1/tenants", json={"id": "default"})
        first, second = [await client.post("/v1/keys", json={"name": "n"}, headers={"Idempotency-Key": "a"}) for _ in range(2)]
    assert (first.status_code, second.status_code, second.json()["error"]["code"]) == (201, 409, "secret_shown_before")
    assert first.json()["key"] not in str(desk.rooms.answers.rows)


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_that_can_be_none_is_refused(desk: Any, key: str) -> None:
    async with desk.client() as client:
        refused = await client.post("/v1/tokenize", json=BODY, headers={"Idempotency-Key": key})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_who_may_not_is_told_so_and_takes_no_key(desk: Any) -> None:
    async with desk.client(desk.new_key("memory:read")) as client:
        refused = await client.post("/v1/tokenize", json=BODY, headers={"Idempotency-Key": "a"})
    assert (refused.status_code, desk.rooms.answers.rows) == (403, {})


async def test_a_second_waits_for_the_first(desk: Any) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> tuple[int, str]:
        begun.set()
        await go_on.wait()
        return 200, "done"

    async def never() -> tuple[int, str]:
        raise AssertionError("it is done once")

    first = asyncio.create_task(answered(desk.rooms.answers, "t", REPEAT, work, PATIENCE))
    await begun.wait()
    second = asyncio.create_task(answered(desk.rooms.answers, "t", REPEAT, never, timedelta(seconds=10)))
    with pytest.raises(ApiError, match="still being worked on"):
        await answered(desk.rooms.answers, "t", REPEAT, never, PATIENCE)
    go_on.set()
    assert (await first, await second) == ((200, None), (200, "done"))


async def test_a_request_that_is_cancelled_gives_its_key_back(desk: Any) -> None:
    begun = asyncio.Event()

    async def work() -> tuple[int, str]:
        begun.set()
        await asyncio.Event().wait()
        return 200, ""

    task = asyncio.create_task(answered(desk.rooms.answers, "t", REPEAT, work, PATIENCE))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert desk.rooms.answers.rows == {}


@pytest.mark.parametrize("given", [(200, "x" * (1024 * 1024 + 1)), (404, "no"), (200, None)])
async def test_what_is_not_to_be_kept_is_not(desk: Any, given: tuple[int, str | None]) -> None:
    async def work() -> tuple[int, str | None]:
        return given

    assert await answered(desk.rooms.answers, "t", REPEAT, work, PATIENCE) == (given[0], None)
    assert desk.rooms.answers.rows == {}


async def test_the_answer_stands_although_it_could_not_be_kept(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any) -> None:
        raise RetryableError("away")

    async def work() -> tuple[int, str]:
        return 200, "done"

    monkeypatch.setattr(desk.rooms.answers, "keep", away)
    assert await answered(desk.rooms.answers, "t", REPEAT, work, PATIENCE) == (200, None)
