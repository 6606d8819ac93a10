"""Reading one's own writes through the gateway: found at once, every time, or told why not (docs/consistency.md)."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from kafka_records import produce
from openai import APIStatusError, OpenAI

from tessera.client import Tessera, read_your_writes
from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PATIENCE = timedelta(seconds=60)
TENANT, STRANGER = "fresh", "fresh-stranger"


class Application:
    """What one tenant's application does."""

    def __init__(self, platform: Platform, tenant: str) -> None:
        self.platform, self.tenant, self.key = platform, tenant, platform.tenant(tenant)
        eventually_blocking(lambda: self.written()[1], PATIENCE)  # memory knows the tenant, and the models are warm

    def written(self, **changed: Any) -> tuple[str, str]:
        """Writes something new; its conversation and its token."""
        name = uuid.uuid4().hex
        item = {"type": "message", "id": name, "conversation_id": name, "role": "user", "content": f"The word is {name}.", **changed}
        answer = self.platform.request("POST", "/v1/memories", key=self.key, json=item)
        assert answer.status_code == 202, answer.text
        return name, answer.json()["consistency"]["token"]

    def search(self, name: str, **consistency: Any) -> httpx.Response:
        body = {"query": "Which word?", "filter": {"conversation_id": name}, "consistency": consistency}
        return self.platform.request("POST", "/v1/memories/search", key=self.key, json=body)

    def found(self, name: str, **consistency: Any) -> list[str]:
        answer = self.search(name, **consistency)
        assert answer.status_code == 200, answer.text
        return [memory["origin_id"] for memory in answer.json()["data"]]


def problem(answer: httpx.Response) -> tuple[int, str]:
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture(scope="module")
def application(platform: Platform) -> Application:
    return Application(platform, TENANT)


@pytest.fixture(scope="module")
def stranger(platform: Platform) -> Application:
    return Application(platform, STRANGER)


@contextmanager
def paused(platform: Platform, consumer: str = "ingestion") -> Iterator[None]:
    """Memory reads nothing new of this class inside."""
    _control(platform, consumer, "pause", "paused")
    try:
        yield
    finally:
        _control(platform, consumer, "resume", "running")


def _control(platform: Platform, consumer: str, action: str, state: str) -> None:
    body = {"action": action, "consumer": consumer}
    platform.request("POST", "/v1/services/memory/control", json=body).raise_for_status()

    def obeyed() -> bool:
        services = platform.request("GET", "/v1/status").json()["services"]
        (memory,) = (service for service in services if service["service"] == "memory")
        return {one["state"] for replica in memory["replicas"] for one in replica["consumers"] if one["name"] == consumer} == {state}

    eventually_blocking(obeyed, PATIENCE)


def test_what_was_written_is_found_at_once_two_hundred_times_in_a_row(application: Application) -> None:
    for _ in range(200):
        name, token = application.written()
        assert application.found(name, level="read_your_writes", token=token) == [name]


def test_a_strong_read_holds_everything_that_was_accepted_before(application: Application, stranger: Application) -> None:
    for _ in range(10):
        names = [application.written()[0] for _ in range(3)]
        stranger.written()
        assert [application.found(name, level="strong") for name in names] == [[name] for name in names]


def test_a_read_may_wait_for_the_vectors_too_and_the_answer_says_what_there_is(application: Application) -> None:
    name, token = application.written()
    answer = application.search(name, level="read_your_writes", token=token, until="vectors").json()
    assert answer["consistency"]["searchable"] == "vectors"
    (memory,) = answer["data"]
    assert memory["scores"]["vector_similarity"] is not None


def test_a_batch_has_one_token_for_all_that_was_taken(application: Application) -> None:
    name = uuid.uuid4().hex
    items = [{"type": "message", "conversation_id": name, "role": "user", "content": f"Word {number}"} for number in range(60)]
    document = {"type": "document", "document_id": name, "title": "t", "content": "A long text. " * 400}
    body = {"items": [*items, document, {"type": "message", "role": "nobody"}]}
    answer = application.platform.request("POST", "/v1/memories/batch", key=application.key, json=body).json()
    assert (answer["accepted"], answer["refused"]) == (61, 1)
    consistency = {"level": "read_your_writes", "token": answer["consistency"]["token"], "until": "vectors"}
    searched = {"query": "Word", "limit": 100, "filter": {"conversation_id": name}, "consistency": consistency}
    found = application.platform.request("POST", "/v1/memories/search", key=application.key, json=searched)
    assert found.status_code == 200, found.text
    assert len(found.json()["data"]) == 60


def test_an_answers_own_token_can_be_read_again(application: Application) -> None:
    name, token = application.written()
    first = application.search(name, level="read_your_writes", token=token).json()["consistency"]
    assert application.found(name, level="read_your_writes", token=first["token"]) == [name]
    assert application.found(name, level="read_your_writes", token=[token, first["token"]]) == [name]
    assert first["as_of"].endswith("Z")


def test_what_came_by_kafka_has_a_token_once_it_was_applied(application: Application) -> None:
    name = uuid.uuid4().hex
    data = {"conversation_id": name, "role": "user", "content": "The word of a producer."}
    attributes = {"specversion": "1.0", "id": name, "source": "/producer", "type": "tessera.message.published.v1", "tenantid": TENANT}
    headers = [(f"ce_{attribute}", value.encode()) for attribute, value in attributes.items()]
    produce(application.platform, f"ingest.{TENANT}", json.dumps(data).encode(), headers)
    assert application.found(name, level="strong") == [name]
    state = application.platform.request("GET", f"/v1/ingest/{name}", key=application.key).json()
    assert application.found(name, level="bounded", token=state["consistency"]["token"]) == [name]


def test_behind_means_an_error_after_the_wait_and_never_an_old_answer(application: Application) -> None:
    with paused(application.platform):
        name, token = application.written()
        for level, waits in (
            ({"level": "read_your_writes", "token": token, "wait_seconds": 1}, 1),
            ({"level": "strong", "wait_seconds": 1}, 1),
            ({"level": "bounded", "token": token, "wait_seconds": 0}, 0),
            ({"level": "bounded", "max_age_seconds": 0, "wait_seconds": 0}, 0),
        ):
            began = time.monotonic()
            answer = application.search(name, **level)
            assert problem(answer) == (503, "not_up_to_bound")
            assert answer.headers["retry-after"]
            assert time.monotonic() - began >= waits
        assert application.found(name, level="eventual") == []
    assert application.found(name, level="read_your_writes", token=token) == [name]


def test_a_reader_that_waits_is_answered_as_soon_as_ingestion_goes_on(application: Application) -> None:
    answers: list[list[str]] = []
    patience_until = time.monotonic() + PATIENCE.total_seconds()

    def read() -> None:
        """As a client: what has waited in vain asks again."""
        answer = application.search(name, level="read_your_writes", token=token, wait_seconds=14)
        while answer.status_code == 503 and time.monotonic() < patience_until:
            answer = application.search(name, level="read_your_writes", token=token, wait_seconds=14)
        answers.append([memory["origin_id"] for memory in answer.json().get("data", [])])

    with paused(application.platform):
        name, token = application.written()
        waiting = [threading.Thread(target=read) for _ in range(80)]  # more than a consumer has in hand at once
        for reader in waiting:
            reader.start()
        # Nobody who waits takes anything from those who do not.
        assert application.found(name, level="eventual") == []
    for reader in waiting:
        reader.join()
    assert answers == [[name]] * len(waiting)


def test_a_bound_in_seconds_is_met_by_a_log_that_was_read_to_a_recent_end(application: Application) -> None:
    name, _ = application.written()
    assert application.found(name, level="bounded", max_age_seconds=0, wait_seconds=10) == [name]
    with paused(application.platform):
        application.written()
        assert application.found(name, level="bounded", max_age_seconds=3_600, wait_seconds=0) == [name]
        assert problem(application.search(name, level="bounded", max_age_seconds=0, wait_seconds=0)) == (503, "not_up_to_bound")


def test_a_refused_write_is_told_with_the_reason(application: Application) -> None:
    name, token = application.written()
    assert application.found(name, level="read_your_writes", token=token) == [name]
    _, again = application.written(id=name, conversation_id=name, content="Another body.")
    answer = application.search(name, level="read_your_writes", token=again)
    assert problem(answer) == (409, "write_refused")
    assert "event_id_reused" in answer.json()["error"]["message"]
    assert application.found(name, level="read_your_writes", token=token) == [name]


def test_a_parked_event_makes_everything_at_and_above_it_pending(application: Application) -> None:
    name, token = application.written()
    far = application.search(name, level="read_your_writes", token=token).json()["consistency"]["token"]
    with _parked(application, name):
        answer = application.search(name, level="read_your_writes", token=token)
        assert problem(answer) == (503, "write_pending")
        assert "dependency_unavailable" in answer.json()["error"]["message"]
        assert problem(application.search(name, level="bounded", token=far)) == (503, "write_pending")
        assert problem(application.search(name, level="strong", wait_seconds=1)) == (503, "write_pending")
        assert application.found(name, level="eventual") == [name]
    assert application.found(name, level="read_your_writes", token=[token, far]) == [name]


@contextmanager
def _parked(application: Application, name: str) -> Iterator[None]:
    """A row as the bus leaves it for an event that could not be applied, at the end of what was read of the event's partition."""
    platform = application.platform
    place = (
        "SELECT consumer, topic, partition, next_offset - 1 FROM memory.consumer_position WHERE topic = $1 AND next_offset > 0 "
        "ORDER BY next_offset DESC LIMIT 1"
    )
    insert = (
        'INSERT INTO memory.parked (consumer, topic, partition, "offset", tenant_id, identity, state, code, message, headers, value, '
        f"record_milliseconds) SELECT place.*, $2, m.origin_digest, 'stuck', 'dependency_unavailable', 'away', '[]', '', 1 FROM ({place}) "
        "place, memory.memory m WHERE m.origin_id = $3 "
        'ON CONFLICT (consumer, topic, partition, "offset") DO UPDATE SET identity = excluded.identity, state = excluded.state, '
        "code = excluded.code, headers = excluded.headers, value = excluded.value, record_milliseconds = excluded.record_milliseconds"
    )
    _execute(platform, insert, f"ingest.{TENANT}", TENANT, name)
    try:
        yield
    finally:
        _execute(platform, "DELETE FROM memory.parked WHERE tenant_id = $1", TENANT)


def _execute(platform: Platform, statement: str, *values: Any) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(platform.database.admin_url)
        try:
            assert not (await connection.execute(statement, *values)).endswith(" 0")
        finally:
            await connection.close()

    asyncio.run(run())


def test_tokens_of_others_and_what_is_no_token_are_refused(application: Application, stranger: Application) -> None:
    name, token = application.written()
    _, foreign = stranger.written()
    spoilt = token[:40] + ("A" if token[40] != "A" else "B") + token[41:]
    for wrong in (foreign, spoilt, "event:m-1", "", "🔑", token[:-4]):
        answer = application.search(name, level="read_your_writes", token=wrong)
        assert answer.status_code == 400, wrong
        assert answer.json()["error"]["param"].startswith("consistency.token")
    assert problem(application.search(name, level="read_your_writes", token=[token, foreign])) == (400, "consistency_token_invalid")
    for level, param in (
        ({"level": "read_your_writes"}, "consistency.token"),
        ({"level": "strong", "token": token}, "consistency.token"),
        ({"level": "eventual", "max_age_seconds": 1}, "consistency.max_age_seconds"),
        ({"level": "bounded", "token": token, "max_age_seconds": 1}, "consistency.token"),
        ({"level": "linearizable"}, "consistency.level"),
    ):
        answer = application.search(name, **level)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_chat_is_grounded_on_what_was_just_written_with_the_official_client(application: Application) -> None:
    client = OpenAI(base_url=f"{application.platform.url}/v1", api_key=application.key, max_retries=0)
    for stream in (False, True):
        name, token = application.written()
        memory = {"conversation_id": name, "consistency": {"level": "read_your_writes", "token": token}}
        messages = [{"role": "user", "content": "Which word is it?"}]
        arguments: dict[str, Any] = {"model": "local/quote", "messages": messages, "extra_body": {"tessera": {"memory": memory}}}
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **arguments))
        else:
            answer = client.chat.completions.create(**arguments)
            text = answer.choices[0].message.content or ""
            assert answer.model_extra is not None
            assert answer.model_extra["tessera"]["consistency"]["searchable"] in {"words", "vectors"}
        assert name in text
    with paused(application.platform):
        name, token = application.written()
        memory = {"conversation_id": name, "consistency": {"level": "read_your_writes", "token": token, "wait_seconds": 0.5}}
        arguments["extra_body"] = {"tessera": {"memory": memory}}
        with pytest.raises(APIStatusError) as raised:
            client.chat.completions.create(**arguments)
    assert (raised.value.status_code, raised.value.code) == (503, "not_up_to_bound")


def test_the_sdk_waits_for_what_it_wrote(application: Application) -> None:
    with Tessera(application.platform.url, application.key) as client:
        name = uuid.uuid4().hex
        written = client.ingest({"type": "message", "conversation_id": name, "role": "user", "content": "By the SDK."})
        found = client.search("the SDK", conversation_id=name, consistency=read_your_writes(written))
        assert [memory["origin_id"] for memory in found["data"]] == [written["event_id"]]


def test_a_reader_is_answered_although_memory_dies_while_it_waits(application: Application) -> None:
    """The memory of all tests: it is back when this one ends."""
    platform, memory = application.platform, application.platform.processes["memory"]
    answers: list[Any] = []
    _control(platform, "ingestion", "pause", "paused")
    name, token = application.written()
    reader = threading.Thread(
        target=lambda: answers.append(application.found(name, level="read_your_writes", token=token, wait_seconds=14))
    )
    reader.start()
    eventually_blocking(lambda: _waiting(memory) == 1, PATIENCE)
    memory.kill()
    memory.start()
    memory.wait_ready()
    reader.join()
    assert answers == [[name]]


def _waiting(memory: Any) -> int:
    _, metrics = memory.get_admin("/metrics")
    return sum(int(float(line.split()[-1])) for line in metrics.splitlines() if line.startswith("tessera_readers_waiting "))
