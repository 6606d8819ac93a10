"""What became of generations, over a real log and a real Postgres: streams read again anywhere, ends told once, sums that add up."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest

from tessera.contracts import uuid7
from tessera.contracts.base import EventData
from tessera.contracts.errors import Problem
from tessera.contracts.events import (
    GenerationCancelled,
    GenerationChunk,
    GenerationCompleted,
    GenerationEnded,
    GenerationRequested,
    ModelReference,
    RequestFailed,
    Usage,
)
from tessera.gateway.adapters.generation_records import BatchRecords, PostgresRecords
from tessera.gateway.domain.records import Ended, GenerationRecord, Since
from tessera.gateway.ports import RecordPage, UsageQuestion
from tessera.storage import Database
from tessera.testkit import ServiceProcess, Stack, eventually_blocking, http_client

pytestmark = pytest.mark.integration

HELLO = [{"role": "user", "content": "Hello"}]
USAGE = Usage(prompt_tokens=9, completion_tokens=3, source="counted")
NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
DAY = date(2026, 11, 20)


def chunk(generation: str, index: int, text: str) -> GenerationChunk:
    return GenerationChunk(generation_id=generation, attempt=1, index=index, text_offset=0, text=text)


def completed(generation: str, last_index: int, text: str) -> GenerationCompleted:
    fields = {"model_id": "local/quote", "finish_reason": "stop", "usage": USAGE}
    return GenerationCompleted(generation_id=generation, attempt=1, last_index=last_index, text=text, **fields)


def ids(text: str) -> list[str]:
    return [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")]


def events(text: str) -> list[str]:
    return [event for event in text.split("\n\n") if event and not event.startswith(":")]


def told_end(gateway: Any, heard: Any, **more: Any) -> None:
    """As the generator tells it, twice."""
    model = ModelReference.model_validate(heard.data["model"])
    fields = {"outcome": "completed", "usage": USAGE, "finish_reason": "stop", "accepted_at": heard.data["accepted_at"], **more}
    ended = GenerationEnded(
        generation_id=heard.data["generation_id"], model=model, caller=heard.data["caller"], ended_at=datetime.now(UTC), **fields
    )
    for _ in range(2):
        gateway.peer.say(ended, key=ended.generation_id.encode())


def answering(heard: Any) -> list[EventData]:
    """The completion overtakes the last chunk, and a chunk comes twice."""
    generation = heard.data["generation_id"]
    one, two, three = (chunk(generation, index, text) for index, text in enumerate(("Hel", "lo ", "世界")))
    return [one, two, one, completed(generation, 2, "Hello 世界"), three]


def test_a_finished_stream_is_read_again_as_it_was_sent(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering)
    body = {"model": "local/quote", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    with gateway.http() as client:
        sent = client.post("/v1/chat/completions", json=body).text
        name = json.loads(events(sent)[0].split("data: ")[1])["id"]
        again = client.get(f"/v1/generations/{name}/events")
        assert events(again.text) == events(sent)
        for place, last in enumerate(ids(sent)):
            rest = client.get(f"/v1/generations/{name}/events", headers={"Last-Event-ID": last})
            assert events(rest.text) == events(sent)[place + 1 :]


def test_an_answer_that_was_no_stream_is_read_as_one(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, answering)
    with gateway.openai() as client:
        name = client.chat.completions.create(model="local/quote", messages=HELLO).id
    with gateway.http() as client:
        text = client.get(f"/v1/generations/{name}/events").text
    said = [json.loads(event.split("data: ")[1]) for event in events(text)[:-1]]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in said) == "Hello 世界"


def left_alone(victim: ServiceProcess, headers: dict[str, str], body: dict[str, Any]) -> str:
    """What a client had of a stream when the gateway that served it was killed."""
    seen = ""
    with (
        http_client(base_url=victim.url, headers=headers, timeout=30) as client,
        suppress(httpx.TransportError),
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        for line in response.iter_lines():
            seen += line + "\n"
            if "and " in line:
                victim.kill()
    assert "[DONE]" not in seen
    return seen


def test_a_stream_goes_on_elsewhere_when_the_replica_that_served_it_is_killed(gateway: Any, stack: Stack) -> None:
    held: list[Any] = []

    def script(heard: Any) -> list[EventData]:
        held.append(heard)
        return [chunk(heard.data["generation_id"], 0, "before "), chunk(heard.data["generation_id"], 1, "and ")]

    gateway.peer.on(GenerationRequested, script)
    victim = ServiceProcess("gateway", stack, gateway.database, gateway.peer.prefix, {"TESSERA_GATEWAY__BOOTSTRAP_KEY": gateway.key})
    victim.start()
    victim.wait_ready()
    body = {"model": "local/quote", "messages": HELLO, "stream": True}
    headers = {"authorization": f"Bearer {gateway.key}"}
    seen = left_alone(victim, headers, body)
    last, heard = ids(seen)[-1], held[0]
    generation = heard.data["generation_id"]
    gateway.peer.say(chunk(generation, 2, "after"), partition=heard.data["reply_partition"], correlation=heard.attributes["id"])
    gateway.peer.say(completed(generation, 2, "before and after"), partition=heard.data["reply_partition"])
    with gateway.http() as client:
        rest = client.get(f"/v1/generations/{generation}/events", headers={"Last-Event-ID": last}).text
    said = [json.loads(event.split("data: ")[1]) for event in events(rest)[:-1]]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in said) == "after"
    assert events(rest)[-1] == "data: [DONE]"
    assert not [one for one in gateway.peer.of(GenerationCancelled) if one.data["generation_id"] == generation]


def test_the_original_post_with_its_key_goes_on_behind_the_last_event(gateway: Any) -> None:
    asked: list[str] = []

    def script(heard: Any) -> list[EventData]:
        asked.append(heard.data["generation_id"])
        return answering(heard) if len(asked) == 1 else []

    gateway.peer.on(GenerationRequested, script)
    body = {"model": "local/quote", "messages": HELLO, "stream": True}
    key = {"Idempotency-Key": "resumed"}
    with gateway.http() as client:
        sent = client.post("/v1/chat/completions", json=body, headers=key).text
        rest = client.post("/v1/chat/completions", json=body, headers={**key, "Last-Event-ID": ids(sent)[1]}).text
        wrong = client.post("/v1/chat/completions", json=body, headers={**key, "Last-Event-ID": "x.1.2.3"})
        unkeyed = client.post("/v1/chat/completions", json=body, headers={"Last-Event-ID": ids(sent)[1]})
    assert events(rest) == events(sent)[2:]
    assert (wrong.json()["error"]["code"], unkeyed.json()["error"]["code"]) == ("last_event_id_unknown", "last_event_id_unknown")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "key", "cancelled"),
    [
        ({}, {}, True),
        ({"on_disconnect": "finish"}, {}, False),
        ({}, {"on_disconnect": "finish"}, False),
        ({"on_disconnect": "cancel"}, {"on_disconnect": "finish"}, True),
    ],
)
def test_what_a_clients_leaving_means_is_for_the_request_then_for_the_key_to_say(
    gateway: Any, options: dict[str, str], key: dict[str, str], cancelled: bool
) -> None:
    asked: list[Any] = []

    def script(heard: Any) -> list[EventData]:
        asked.append(heard)
        return [chunk(heard.data["generation_id"], 0, "first")]

    gateway.peer.on(GenerationRequested, script)
    with gateway.http() as client:
        made = client.post("/v1/keys", json={"name": "leaves", "scopes": ["inference"], **key}).json()
    body = {"model": "local/quote", "messages": HELLO, "stream": True, "tessera": options}
    request_id = f"leaves-{uuid7()}"
    with (
        gateway.http(made["key"]) as client,
        client.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": request_id}) as response,
    ):
        next(line for line in response.iter_lines() if "first" in line)
    generation = asked[0].data["generation_id"]
    eventually_blocking(lambda: any(line.get("request_id") == request_id for line in gateway.process.log_records()))
    with gateway.http() as client:
        # What comes after is behind it in the log: once this is heard, nothing is on its way any more.
        assert client.post(f"/v1/generations/{generation}/cancel").status_code == 202

    def reasons() -> list[str]:
        return [one.data["reason"] for one in gateway.peer.of(GenerationCancelled) if one.data["generation_id"] == generation]

    eventually_blocking(lambda: "client_request" in reasons())
    assert reasons() == (["client_disconnected", "client_request"] if cancelled else ["client_request"])


def test_an_end_that_is_told_twice_counts_once(gateway: Any) -> None:
    asked: list[Any] = []

    def script(heard: Any) -> list[EventData]:
        asked.append(heard)
        return answering(heard)

    gateway.peer.on(GenerationRequested, script)
    with gateway.http() as client:
        made = client.post("/v1/keys", json={"name": "counted", "scopes": ["inference"]}).json()
    with gateway.openai(made["key"]) as client:
        for _ in range(3):
            client.chat.completions.create(model="local/quote", messages=HELLO, user="u-1")
    for heard in asked:
        told_end(gateway, heard)
    with gateway.http() as client:
        question = {"key_id": made["id"], "group_by": ["day", "key_id", "model"]}
        used = eventually_blocking(
            lambda: [row for row in client.get("/v1/usage", params=question).json()["data"] if row["requests"] == 3], timedelta(seconds=30)
        )
        page = client.get("/v1/generations", params={"key_id": made["id"], "status": "completed"}).json()
    assert (used[0]["prompt_tokens"], used[0]["completion_tokens"], used[0]["errors"], used[0]["model"]) == (27, 9, 0, "local/quote")
    assert {one["id"] for one in page["data"]} == {heard.data["generation_id"] for heard in asked}
    assert {(one["user"], one["key_id"], one["usage"]["total_tokens"]) for one in page["data"]} == {("u-1", made["id"], 12)}


def test_an_end_that_only_the_asker_was_told_is_read_from_the_log(gateway: Any) -> None:
    asked: list[Any] = []

    def script(heard: Any) -> list[EventData]:
        asked.append(heard)
        return [RequestFailed(problem=Problem(code="expired", message="Too late.", status=504))]

    gateway.peer.on(GenerationRequested, script)
    with gateway.openai() as client, pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="local/quote", messages=HELLO)
    with gateway.http() as client:
        path = f"/v1/generations/{asked[0].data['generation_id']}"
        record = eventually_blocking(lambda: (told := client.get(path).json())["status"] == "failed" and told, timedelta(seconds=60))
    assert record["error"]["code"] == "expired"


def test_a_deadline_of_the_clients_own_ends_the_wait(gateway: Any) -> None:
    gateway.peer.on(GenerationRequested, lambda _: [])
    with gateway.http() as client:
        started = datetime.now(UTC)
        late = client.post(
            "/v1/chat/completions", json={"model": "local/quote", "messages": HELLO}, headers={"Tessera-Deadline-Seconds": "0.5"}
        )
        wrong = client.get("/v1/models", headers={"Tessera-Deadline-Seconds": "soon"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timed_out")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "Tessera-Deadline-Seconds")
    heard = gateway.peer.of(GenerationRequested)[-1]
    assert datetime.fromisoformat(heard.attributes["deadline"]) - started < timedelta(seconds=4)


@pytest.fixture
async def database(gateway: Any) -> AsyncIterator[Database]:
    opened = Database("gateway", gateway.database.settings("gateway"))
    yield opened
    await opened.close()


def record(tenant_id: str, name: str, **more: Any) -> GenerationRecord:
    fields = {"deadline": NOW, "credential_id": "k", "since": Since(1, 2), **more}
    return GenerationRecord(tenant_id, name, "m", "asked", "p", "chat", NOW, **fields)


def end(**more: Any) -> Ended:
    fields = {"prompt_tokens": 10, "completion_tokens": 5, "usage_source": "counted", "cost": Decimal("0.000025"), **more}
    return Ended("completed", NOW + timedelta(seconds=2), "stop", **fields)


class Worker:
    """A transaction of the worker's, as the bus hands it over."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


async def written(database: Database, accepted: list[GenerationRecord], ended: list[tuple[GenerationRecord, Ended]]) -> None:
    async with database.transaction() as connection:
        batch = BatchRecords(Worker(connection))  # type: ignore[arg-type]
        if accepted:
            await batch.accept(accepted, timedelta(seconds=10))
        if ended:
            await batch.end(ended)


async def test_both_orders_of_events_give_one_row_and_repeats_change_nothing(database: Database) -> None:
    tenant, other = f"t-{uuid7().hex[-12:]}", f"t-{uuid7().hex[-12:]}"
    known, later = record(tenant, "known"), record(tenant, "later")
    bare = replace(later, deadline=None, since=None)
    await written(database, [known], [(known, end())])
    await written(database, [], [(bare, end()), (known, end(prompt_tokens=99))])
    await written(database, [later, known], [])
    records = PostgresRecords(database)
    assert await records.find(tenant, "known") == replace(known, ended=end())
    assert await records.find(tenant, "later") == replace(later, ended=end())
    assert await records.find(other, "known") is None
    assert [one.id for one in await records.page(tenant, RecordPage(1)) or ()] == ["later"]
    assert [one.id for one in await records.page(tenant, RecordPage(5, after="later")) or ()] == ["known"]
    assert await records.page(tenant, RecordPage(5, after="nowhere")) is None


async def test_sums_say_the_same_before_while_and_after_they_are_made(database: Database) -> None:
    tenant = f"t-{uuid7().hex[-12:]}"
    rows = [record(tenant, f"g{number}") for number in range(40)]
    await written(database, rows, [(row, end()) for row in rows])
    records = PostgresRecords(database)
    question = UsageQuestion(DAY, DAY, ("day", "credential_id", "model_id"), 10)
    looks = []

    async def counted() -> None:
        for _ in range(20):
            await records.count(7)

    async def looked() -> None:
        looks.extend([await records.usage(tenant, question) for _ in range(20)])

    await asyncio.gather(counted(), counted(), looked())
    looks.append(await records.usage(tenant, question))
    for (row,) in looks:
        assert (row.requests, row.prompt_tokens, row.completion_tokens, row.cost) == (40, 400, 200, Decimal("0.001"))
        assert (row.day, row.credential_id, row.model_id, row.milliseconds) == (DAY, "k", "m", 80_000)
    assert await records.usage(tenant, replace(question, groups=())) == [replace(row, day=None, credential_id=None, model_id=None)]
    assert await records.usage(tenant, replace(question, since=DAY + timedelta(days=1), until=DAY + timedelta(days=1), groups=())) == []
