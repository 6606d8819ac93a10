"""What became of generations: as events tell it, as the log tells it, and as its reader asks for it."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

import pytest

from tessera.bus import Received
from tessera.contracts import uuid7
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem, RetryableError
from tessera.contracts.events import (
    CallerIdentity,
    ChatMessage,
    GenerationCancelled,
    GenerationChunk,
    GenerationCompleted,
    GenerationEnded,
    GenerationFailed,
    GenerationRequested,
    ModelReference,
    StreamOptions,
    Usage,
)
from tessera.gateway.domain.assembly import Located
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.records import GenerationRecord, Price, Prices, Since, UsageRow
from tessera.gateway.handlers import records as handlers
from tessera.gateway.handlers.records import Bookkeeper

pytestmark = pytest.mark.unit

D = TypeVar("D", bound=EventData)
NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
MODEL = ModelReference(model_id="chat", provider="local", capability="chat", encoding="e", template="t", exact=True)
USAGE = Usage(prompt_tokens=1_000, completion_tokens=500, source="counted")
PRICES = Prices({"chat": Price(Decimal(2), Decimal(8))})


def received(data: D, tenant_id: str = "default") -> Received[D]:
    fields: dict[str, Any] = dict.fromkeys(("subject_id", "request_id", "traceparent", "sequence", "correlation_id", "key"))
    fields |= {"id": "e", "source": "s", "type": data.event_type, "time": NOW, "tenant_id": tenant_id, "topic": "t", "digest": b""}
    return Received(data=data, partition=0, offset=0, deadline=NOW + timedelta(minutes=2), **fields)


def requested(**more: Any) -> GenerationRequested:
    said = (ChatMessage(role="user", content="x"),)
    fields = {"reply_partition": 3, "generation_id": "g", "model": MODEL, "messages": said, "stream": True, **more}
    return GenerationRequested(**fields)


def ended(**more: Any) -> GenerationEnded:
    return GenerationEnded(**{"generation_id": "g", "outcome": "completed", "model": MODEL, "usage": USAGE, "ended_at": NOW, **more})


def record(**more: Any) -> GenerationRecord:
    return GenerationRecord("default", "g", "chat", "chat", "local", "chat", NOW, since=Since(3, 0), **more)


def located(offset: int, data: Any) -> Located:
    return Located(data, 3, offset)


def chunk(index: int, text: str) -> GenerationChunk:
    return GenerationChunk(generation_id="g", attempt=1, index=index, text_offset=0, text=text)


def completed(last_index: int) -> GenerationCompleted:
    return GenerationCompleted(
        generation_id="g", attempt=1, last_index=last_index, model_id="chat", text="ab", finish_reason="stop", usage=USAGE
    )


def stream(desk: Any) -> None:
    """Two pieces, the completion overtaking the second, then the second."""
    desk.log.replies = [located(5, chunk(0, "a")), located(6, completed(1)), located(9, chunk(1, "b"))]
    desk.rooms.records.rows["default", "g"] = record()


async def lines(desk: Any, last: str | None = None, path: str = "/v1/generations/g/events") -> Sequence[str]:
    headers = {} if last is None else {"Last-Event-ID": last}
    async with desk.client() as client:
        response = await client.get(path, headers=headers)
    assert response.status_code == 200, response.text
    return [line for line in response.text.split("\n\n") if line]


async def test_a_request_and_its_end_make_one_record_in_either_order(desk: Any) -> None:
    identity = CallerIdentity(credential_id="k", user="u")
    request = received(requested(asked_model="gpt", caller=identity, accepted_at=NOW, reply_offset=7, stream_options=StreamOptions()))
    end = received(ended(asked_model="gpt", caller=identity, accepted_at=NOW))
    first, second = desk.rooms.records, type(desk.rooms.records)()
    await handlers.generations_requested([request], first)
    await handlers.generations_ended([end], first, PRICES)
    await handlers.generations_ended([end], second, PRICES)
    await handlers.generations_requested([request], second)
    assert first.rows == second.rows
    known = first.rows["default", "g"]
    assert (known.asked_model, known.credential_id, known.user, known.since) == ("gpt", "k", "u", Since(3, 7))
    assert known.ended is not None
    assert (known.status, known.ended.cost) == ("completed", Decimal("0.006"))


async def test_a_model_without_a_price_has_no_cost(desk: Any) -> None:
    await handlers.generations_ended([received(ended())], desk.rooms.records, Prices())
    assert desk.rooms.records.rows["default", "g"].ended.cost is None


@pytest.mark.parametrize(
    ("replies", "status"),
    [
        ([located(0, completed(-1))], "completed"),
        ([located(0, GenerationFailed(generation_id="g", problem=Problem(code="expired", message="Late.")))], "failed"),
        ([located(0, GenerationFailed(generation_id="g", problem=Problem(code="generation_cancelled", message="Left.")))], "cancelled"),
    ],
)
async def test_an_end_that_no_event_told_is_read_from_the_log(desk: Any, replies: list[Located], status: str) -> None:
    desk.log.replies = replies
    desk.rooms.records.rows["default", "g"] = record(deadline=NOW)
    await Bookkeeper(desk.rooms.records, desk.log, PRICES, timedelta(days=1)).once()
    assert desk.rooms.records.rows["default", "g"].status == status


async def test_one_whose_end_may_still_come_goes_on_and_one_of_long_ago_is_lost(desk: Any) -> None:
    rows = desk.rooms.records.rows
    rows["default", "young"] = GenerationRecord("default", "young", "m", "m", "p", "chat", datetime.now(UTC), since=Since(0, 0))
    rows["default", "old"] = GenerationRecord("default", "old", "m", "m", "p", "chat", NOW - timedelta(days=400), since=Since(0, 0))
    rows["default", "nowhere"] = GenerationRecord("default", "nowhere", "m", "m", "p", "chat", datetime.now(UTC))
    await Bookkeeper(desk.rooms.records, desk.log, PRICES, timedelta(days=1), reading=timedelta(milliseconds=20)).once()
    assert {name: row.status for (_, name), row in rows.items()} == {"young": "running", "old": "failed", "nowhere": "failed"}


async def test_what_the_log_no_longer_holds_is_lost(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def expired(*_: Any, **__: Any) -> Any:
        raise ApiError(410, "stream_expired", "gone")

    monkeypatch.setattr(desk.log, "stream", expired)
    desk.rooms.records.rows["default", "g"] = record()
    await Bookkeeper(desk.rooms.records, desk.log, PRICES, timedelta(days=1)).once()
    assert "generation_lost" in desk.rooms.records.rows["default", "g"].ended.problem


async def test_a_stream_is_read_again_whole_and_from_behind_every_one_of_its_events(desk: Any) -> None:
    stream(desk)
    whole = await lines(desk)
    assert whole[-1] == "data: [DONE]"
    ids = [line.split("\n")[0].removeprefix("id: ") for line in whole[:-1]]
    assert len(set(ids)) == len(ids) == 4
    for place, last in enumerate(ids):
        assert await lines(desk, last) == whole[place + 1 :]


async def test_the_answers_own_id_names_the_generation_too(desk: Any) -> None:
    stream(desk)
    assert await lines(desk) == await lines(desk, path="/v1/generations/chatcmpl-g/events")


@pytest.mark.parametrize("last", ["nonsense", "other.3.5.0", "g.3.5.99", "g.9.5.0", "g.3.99999.0"])
async def test_an_id_that_no_event_of_the_stream_has_is_refused(desk: Any, last: str) -> None:
    stream(desk)
    async with desk.client() as client:
        response = await client.get("/v1/generations/g/events", headers={"Last-Event-ID": last})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "last_event_id_unknown")
    assert desk.log.open_streams == 0


async def test_leaving_a_stream_that_is_read_again_cancels_nothing(desk: Any) -> None:
    stream(desk)
    await lines(desk)
    assert not [data for data, _ in desk.log.published if isinstance(data, GenerationCancelled)]


async def test_a_generation_whose_request_is_still_on_its_way_is_waited_for(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    found = record()

    async def find(tenant_id: str, generation_id: str) -> GenerationRecord | None:
        looks.append(1)
        return found if len(looks) == 3 else None

    monkeypatch.setattr(desk.rooms.records, "find", find)
    async with desk.client() as client:
        assert (await client.get("/v1/generations/g")).json()["status"] == "running"


async def test_a_request_that_a_dead_replica_was_to_write_down_is_found_in_the_log(desk: Any) -> None:
    name, keyed = str(uuid7()), "keyed"
    for each in (name, keyed):
        desk.log.requests["default", each] = received(requested(generation_id=each, reply_offset=0))
    desk.rooms.generations.rows["default", keyed] = (b"", Since(3, 0))
    async with desk.client() as client:
        for each in (name, keyed):
            assert (await client.get(f"/v1/generations/{each}")).json()["status"] == "running"
        for unknown in ("nobody", str(UUID(int=uuid7().int & ~(2**79 - 1) >> 3)), str(uuid7(1)), str(uuid7())):
            assert (await client.get(f"/v1/generations/{unknown}")).status_code == 404
    assert [searched for searched, _ in desk.log.searched[:2]] == [name, keyed]
    assert len(desk.log.searched) == 3


async def test_another_tenants_generation_does_not_exist(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "_ARRIVING", timedelta(0))
    stream(desk)
    stranger = desk.new_key("inference", tenant_id="other")
    async with desk.client(stranger) as client:
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
            response = await client.request(method, f"/v1/generations/g{path}")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "generation_not_found")
    assert not desk.log.published


async def test_cancelling_says_who_asked_and_leaves_what_has_ended_alone(desk: Any) -> None:
    desk.rooms.records.rows["default", "g"] = record()
    async with desk.client() as client:
        assert (await client.post("/v1/generations/chatcmpl-g/cancel")).status_code == 202
        await handlers.generations_ended([received(ended())], desk.rooms.records, PRICES)
        again = await client.post("/v1/generations/g/cancel")
    assert (again.status_code, again.json()["status"], again.json()["usage"]["total_tokens"]) == (202, "completed", 1_500)
    assert [data.reason for data, _ in desk.log.published if isinstance(data, GenerationCancelled)] == ["client_request"]


async def test_a_failure_is_told_with_its_code(desk: Any) -> None:
    await handlers.generations_requested([received(requested())], desk.rooms.records)
    failed = ended(outcome="failed", usage=None, problem=Problem(code="provider_error", message="Broken.", status=502))
    await handlers.generations_ended([received(failed)], desk.rooms.records, PRICES)
    async with desk.client() as client:
        told = (await client.get("/v1/generations/g")).json()
    assert (told["status"], told["error"], told["usage"]) == ("failed", {"code": "provider_error", "message": "Broken."}, None)


async def test_pages_of_generations(desk: Any) -> None:
    for name in ("a", "b", "c"):
        desk.rooms.records.rows["default", name] = GenerationRecord("default", name, "m", "m", "p", "chat", NOW)
    async with desk.client() as client:
        page = (await client.get("/v1/generations", params={"limit": 2})).json()
        nowhere = await client.get("/v1/generations", params={"after": "z"})
    assert ([one["id"] for one in page["data"]], page["has_more"], page["last_id"]) == (["a", "b"], True, "b")
    assert nowhere.status_code == 404


async def test_usage_of_another_tenant_needs_an_operator(desk: Any) -> None:
    desk.rooms.records.sums = [UsageRow(date(2026, 11, 20), None, "chat", 3, 1, 10, 5, Decimal("0.25"), 1_500)]
    async with desk.client(desk.new_key("usage")) as client:
        own = (await client.get("/v1/usage", params={"group_by": ["day", "model"], "since": "2026-11-01"})).json()
        other = await client.get("/v1/usage", params={"tenant_id": "other"})
        wrong = await client.get("/v1/usage", params={"since": "2026-11-02", "until": "2026-11-01"})
        number = await client.get("/v1/usage", params={"until": "0"})
    assert own["data"][0] == {
        "day": "2026-11-20",
        "key_id": None,
        "model": "chat",
        "requests": 3,
        "errors": 1,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "cost": 0.25,
        "seconds": 1.5,
    }
    assert desk.rooms.records.asked[0].groups == ("day", "model_id")
    assert (other.status_code, wrong.status_code, number.status_code) == (403, 400, 400)
    async with desk.client() as client:
        assert (await client.get("/v1/usage", params={"tenant_id": "other"})).json()["tenant_id"] == "other"


async def test_whether_it_is_known_is_no_reason_to_fail(desk: Any) -> None:
    desk.rooms.records.away = RetryableError("away")
    assert not await handlers.is_known(desk.rooms.records, desk.log, "default", "g", NOW)
