"""Chats that are kept: when their row is written, how it ends, and what is shown of it."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import GenerationCompleted, GenerationFailed, Usage
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.stored import Repair
from tessera.gateway.workers import every

pytestmark = pytest.mark.unit

HELLO = {"role": "user", "content": "Hello"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Look."}]}
BODY = {"model": "chat", "messages": [HELLO, PARTS], "store": True, "metadata": {"topic": "keys"}, "seed": 3, "user": "u-1"}
MONTH = timedelta(days=30)


def completed(text: str = "Hi") -> GenerationCompleted:
    usage = Usage(prompt_tokens=1, completion_tokens=1, source="counted")
    return GenerationCompleted(generation_id="g", attempt=1, last_index=-1, model_id="chat", text=text, finish_reason="stop", usage=usage)


def failed() -> GenerationFailed:
    return GenerationFailed(generation_id="g", problem=Problem(code="provider_error", message="no"))


async def chat(desk: Any, *replies: Any, **more: Any) -> Any:
    desk.log.replies = [Located(reply, 3, 9) for reply in replies]
    async with desk.client() as client:
        return await client.post("/v1/chat/completions", json={**BODY, **more})


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_is_stored_before_its_asker_has_it(desk: Any, stream: bool) -> None:
    assert (await chat(desk, completed(), stream=stream)).status_code == 200
    (row,) = desk.rooms.stored.rows.values()
    assert (row.tenant_id, row.model, row.metadata, row.since.offset) == ("default", "chat", {"topic": "keys"}, 7)
    assert json.loads(row.answer)["choices"][0]["message"]["content"] == "Hi"
    async with desk.client() as client:
        shown = (await client.get(f"/v1/chat/completions/chatcmpl-{row.id}")).json()
        listed = (await client.get("/v1/chat/completions")).json()
        messages = (await client.get(f"/v1/chat/completions/chatcmpl-{row.id}/messages?limit=1&order=desc")).json()
    assert (shown["seed"], shown["metadata"], shown["user"], shown["object"]) == (3, {"topic": "keys"}, "u-1", "chat.completion")
    assert "messages" not in shown
    assert (listed["data"], listed["first_id"], listed["has_more"]) == ([shown], shown["id"], False)
    assert messages["data"] == [{"id": f"{shown['id']}-1", "role": "user", "content": None, "content_parts": PARTS["content"]}]
    assert messages["has_more"] is True


async def test_nothing_is_stored_unless_it_is_asked_for(desk: Any) -> None:
    assert (await chat(desk, completed(), store=False, metadata=None)).status_code == 200
    assert desk.rooms.stored.rows == {}


async def test_what_failed_is_not_kept(desk: Any) -> None:
    assert (await chat(desk, failed())).status_code == 502
    assert desk.rooms.stored.rows == {}


async def test_what_could_not_be_published_is_not_kept(desk: Any) -> None:
    desk.log.refuses = lambda _: ApiError(503, "dependency_unavailable", "no")
    assert (await chat(desk)).status_code == 503
    assert desk.rooms.stored.rows == {}


async def test_without_a_row_nothing_is_begun(desk: Any) -> None:
    desk.rooms.stored.away = RetryableError("away")
    assert (await chat(desk, completed())).status_code == 503
    assert desk.log.published == []


async def test_an_answer_that_cannot_be_stored_is_given_and_stored_later(desk: Any) -> None:
    keeping = desk.rooms.stored
    write, keeping.answer = keeping.answer, unavailable
    assert (await chat(desk, completed())).status_code == 200
    (row,) = keeping.rows.values()
    assert row.answer is None
    keeping.answer = write
    await Repair(keeping, desk.log, MONTH).once()
    (row,) = keeping.rows.values()
    assert json.loads(row.answer)["id"] == f"chatcmpl-{row.id}"


async def unavailable(*_: Any) -> None:
    raise RetryableError("away")


async def pending(desk: Any) -> Any:
    """A row whose gateway died."""
    keeping = desk.rooms.stored
    write, keeping.answer = keeping.answer, unavailable
    await chat(desk, completed())
    keeping.answer = write
    return keeping


async def test_a_failure_that_nobody_saw(desk: Any) -> None:
    keeping = await pending(desk)
    desk.log.replies = [Located(failed(), 3, 9)]
    await Repair(keeping, desk.log, MONTH).once()
    assert keeping.rows == {}


async def test_an_end_that_is_not_there_yet_is_waited_for_but_not_for_ever(desk: Any) -> None:
    keeping = await pending(desk)
    desk.log.replies = []
    repair = Repair(keeping, desk.log, MONTH, reading=timedelta(milliseconds=10))
    await repair.once()
    ((key, row),) = keeping.rows.items()
    keeping.rows[key] = replace(row, created_at=datetime.now(UTC) - timedelta(days=2))
    await repair.once()
    assert keeping.rows == {}


async def test_what_the_log_has_forgotten_is_given_up(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = await pending(desk)

    def lapsed(*_: Any, **__: Any) -> Any:
        raise ApiError(410, "stream_expired", "gone")

    monkeypatch.setattr(type(desk.log), "stream", lapsed)
    await Repair(keeping, desk.log, MONTH).once()
    assert keeping.rows == {}


async def test_the_loop_survives_a_look_that_fails(desk: Any) -> None:
    stopping, looks = asyncio.Event(), list[int]()

    class Failing(Repair):
        async def once(self) -> None:
            looks.append(1)
            if len(looks) == 2:
                stopping.set()
            raise RetryableError("away")

    async with asyncio.timeout(5):
        await every(timedelta(milliseconds=1), Failing(desk.rooms.stored, desk.log, MONTH), "failed")(stopping)
    assert len(looks) == 2


@pytest.mark.parametrize(
    ("method", "path", "error"),
    [
        ("GET", "/v1/chat/completions/chatcmpl-none", (404, "completion_not_found", None)),
        ("GET", "/v1/chat/completions/other", (404, "completion_not_found", None)),
        ("GET", "/v1/chat/completions/chatcmpl-none/messages", (404, "completion_not_found", None)),
        ("DELETE", "/v1/chat/completions/chatcmpl-none", (404, "completion_not_found", None)),
        ("GET", "/v1/chat/completions?limit=0", (400, "integer_below_min_value", "limit")),
        ("GET", "/v1/chat/completions?metadata=x", (400, "invalid_value", "metadata")),
        ("GET", "/v1/chat/completions?after=other", (404, "completion_not_found", None)),
    ],
)
async def test_what_is_not_there(desk: Any, method: str, path: str, error: tuple[int, str, str | None]) -> None:
    async with desk.client() as client:
        answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == error
