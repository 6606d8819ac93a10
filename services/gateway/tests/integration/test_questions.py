"""Models, embeddings, tokens, memory, retention and validation over a real gateway and a real log."""

import base64
import struct
from typing import Any

import pytest

from tessera.contracts.errors import Problem
from tessera.contracts.events import (
    DocumentPublished,
    EmbeddingCompleted,
    EmbeddingRequested,
    EntityPublished,
    IngestionInspected,
    IngestionReported,
    MessagePublished,
    PolicyInspected,
    PolicyReported,
    PolicySubmitted,
    RecallCompleted,
    RecalledMemory,
    RecallRequested,
    RecallScores,
    RelationPublished,
    RequestFailed,
    SweepCancelled,
    SweepInspected,
    SweepReported,
    SweepRequested,
    TokenizationCompleted,
    TokenizationRequested,
    ValidationCancelled,
    ValidationInspected,
    ValidationReported,
    ValidationRequested,
)
from tessera.testkit import eventually_blocking

pytestmark = pytest.mark.integration

NOW = "2026-11-21T03:00:00Z"
MESSAGE = {"type": "message", "conversation_id": "c-1", "role": "user", "content": "The key is under the third stone."}


def test_models_say_what_they_are(gateway: Any) -> None:
    with gateway.openai() as client:
        models = {model.id: model for model in client.models.list()}
        one = client.models.retrieve("local/quote")
    assert set(models) == {"local/quote", "remote/chat", "local/ngram", "local/minilm"}
    assert one.owned_by == "tests"
    assert one.model_extra is not None
    assert one.model_extra["tessera"]["capability"] == "chat"
    assert one.model_extra["tessera"]["counts_are_exact"] is True


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_embeddings(gateway: Any, encoding_format: str) -> None:
    vectors = ((0.6, 0.8), (1.0, 0.0))
    gateway.peer.on(EmbeddingRequested, lambda _: [EmbeddingCompleted(model="local/minilm", vectors=vectors, token_counts=(3, 4))])
    body = {"model": "local/minilm", "input": ["a", "b"], "encoding_format": encoding_format}
    with gateway.http() as client, gateway.openai() as sdk:
        answer = client.post("/v1/embeddings", json=body).json()
        parsed = sdk.embeddings.create(model="local/minilm", input=["a", "b"])
    given = answer["data"][1]["embedding"]
    assert given == [1.0, 0.0] if encoding_format == "float" else struct.unpack("<2f", base64.b64decode(given)) == (1.0, 0.0)
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert parsed.data[0].embedding == pytest.approx([0.6, 0.8])


def test_tokenize_and_detokenize(gateway: Any) -> None:
    def script(heard: Any) -> list[Any]:
        encodes = "text" in heard.data
        done = TokenizationCompleted(
            operation="encode" if encodes else "decode",
            encoding=heard.data["encoding"],
            text="世界 👋",
            tokens=(1, 2),
            composition_id="ab" * 32,
        )
        return [done]

    gateway.peer.on(TokenizationRequested, script)
    with gateway.http() as client:
        encoded = client.post("/v1/tokenize", json={"text": "世界 👋", "model": "local/quote"}).json()
        decoded = client.post("/v1/detokenize", json={"composition_id": encoded["composition_id"]}).json()
        both = client.post("/v1/detokenize", json={"composition_id": "ab" * 32, "tokens": [1]})
    assert (encoded["tokens"], encoded["count"], encoded["encoding"]) == ([1, 2], 2, "o200k_base")
    assert decoded["text"] == "世界 👋"
    assert (both.status_code, both.json()["error"]["code"]) == (400, "invalid_value")


def test_a_message_goes_to_the_tenants_own_topic_as_a_cloud_event(gateway: Any) -> None:
    with gateway.http() as client:
        response = client.post(
            "/v1/memories", json={**MESSAGE, "id": "mine-7", "subject_id": "person-1"}, headers={"x-request-id": "ingest-1"}
        )
    assert response.status_code == 202
    accepted = response.json()
    assert (accepted["event_id"], accepted["consistency"]["status_url"]) == ("mine-7", "/v1/ingest/mine-7")
    heard = eventually_blocking(lambda: [said for said in gateway.peer.of(MessagePublished) if said.attributes["id"] == "mine-7"])[0]
    assert heard.topic == "ingest.default"
    assert heard.data == {name: value for name, value in MESSAGE.items() if name != "type"} | {"metadata": {}}
    assert (heard.attributes["tenantid"], heard.attributes["subjectid"], heard.attributes["requestid"]) == (
        "default",
        "person-1",
        "ingest-1",
    )
    assert heard.attributes["source"] == "/tessera/gateway"


def test_each_item_of_a_batch_is_judged_alone(gateway: Any) -> None:
    items = [
        {"type": "document", "document_id": "d-1", "content": "long"},
        {"type": "message", "conversation_id": "c", "role": "nobody", "content": "x"},
        {"type": "entity", "entity_id": "ada", "name": "Ada", "kind": "person"},
        {"type": "relation", "source_entity_id": "ada", "relation": "knows", "target_entity_id": "mary", "weight": 2},
        {"type": "relation", "source_entity_id": "ada", "relation": "knows", "target_entity_id": "mary"},
        "nothing",
        {"type": "thought"},
    ]
    with gateway.http() as client:
        answer = client.post("/v1/memories/batch", json={"items": items}, headers={"Idempotency-Key": "batch-1"})
        again = client.post("/v1/memories/batch", json={"items": items}, headers={"Idempotency-Key": "batch-1"})
    assert answer.status_code == 202
    body = answer.json()
    assert [item["status"] for item in body["data"]] == ["accepted", "refused", "accepted", "refused", "accepted", "refused", "refused"]
    assert (body["accepted"], body["refused"], body["failed"]) == (3, 4, 0)
    assert body["data"][1]["error"]["param"] == "items[1].role"
    assert body["data"][3]["error"]["param"] == "items[3].weight"
    assert [item.get("event_id") for item in again.json()["data"]] == [item.get("event_id") for item in body["data"]]
    for event in (DocumentPublished, EntityPublished, RelationPublished):
        eventually_blocking(lambda event=event: len(gateway.peer.of(event)) >= 2)


def test_where_an_event_stands(gateway: Any) -> None:
    reason = Problem(code="event_id_reused", message="Another body.")
    gateway.peer.on(IngestionInspected, lambda heard: [IngestionReported(event_id=heard.data["event_id"], state="refused", reason=reason)])
    with gateway.http() as client:
        answer = client.get("/v1/ingest/mine-7").json()
    assert (answer["event_id"], answer["status"], answer["reason"]["code"]) == ("mine-7", "refused", "event_id_reused")


def test_search_explains_its_scores(gateway: Any) -> None:
    scores = RecallScores(total=0.9, vector=0.5, lexical=0.4, vector_rank=1)
    memory = RecalledMemory(
        memory_id="m-1", kind="message", text="stone", scores=scores, occurred_at=NOW, importance=0.5, origin_id="mine-7"
    )
    gateway.peer.on(RecallRequested, lambda _: [RecallCompleted(memories=(memory,), degraded=("embedder",))])
    with gateway.http() as client:
        answer = client.post("/v1/memories/search", json={"query": "key?", "limit": 3, "filter": {"kinds": ["message"]}}).json()
    assert answer["data"][0]["scores"]["lexical"] == 0.4
    assert (answer["data"][0]["id"], answer["data"][0]["occurred_at"], answer["degraded"]) == ("m-1", NOW, ["embedder"])
    heard = gateway.peer.of(RecallRequested)[-1]
    assert (heard.data["limit"], heard.data["filter"]) == (3, {"kinds": ["message"]})


def test_a_question_that_nobody_answers_is_504(gateway: Any) -> None:
    gateway.peer.on(RecallRequested, lambda _: [])
    with gateway.http() as client:
        response = client.post("/v1/memories/search", json={"query": "anyone?"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timed_out")


def test_a_dependency_that_is_down_is_503_with_retry_after(gateway: Any) -> None:
    gateway.peer.on(RecallRequested, lambda _: [RequestFailed(problem=Problem(code="dependency_unavailable", message="No Postgres."))])
    with gateway.http() as client:
        response = client.post("/v1/memories/search", json={"query": "anyone?"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")


def test_the_policy_of_retention(gateway: Any) -> None:
    policy = {"max_age_days": 30, "importance_threshold": None, "kinds": ["message"]}
    gateway.peer.on(PolicySubmitted, lambda heard: [PolicyReported(policy=heard.data["policy"], version=1, updated_at=NOW)])
    gateway.peer.on(PolicyInspected, lambda _: [PolicyReported(policy=None, version=0)])
    with gateway.http() as client:
        put = client.put("/v1/retention/policy", json=policy)
        got = client.get("/v1/retention/policy").json()
        empty = client.put("/v1/retention/policy", json={"kinds": ["message"]})
    assert (put.status_code, put.json()["policy"], put.json()["version"]) == (200, policy, 1)
    assert got == {"policy": None, "version": 0, "updated_at": None}
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, "invalid_value")
    keys = {gateway.peer.of(event)[-1].key for event in (PolicySubmitted, PolicyInspected)}
    assert len(keys) == 1


def test_a_sweep_is_planned_carried_out_and_shown(gateway: Any) -> None:
    def report(heard: Any) -> list[Any]:
        if heard.data["sweep_id"] == "unknown":
            return [RequestFailed(problem=Problem(code="sweep_not_found", message="No such sweep."))]
        fields = {"dry_run": True, "policy_version": 1, "planned": 1, "archived": 0, "skipped": 0, "created_at": NOW}
        return [SweepReported(sweep_id=heard.data["sweep_id"], state="planned", next_cursor="m-1", **fields)]

    gateway.peer.on(SweepInspected, report)
    with gateway.http() as client:
        accepted = client.post("/v1/retention/sweeps", json={"dry_run": True}, headers={"Idempotency-Key": "sweep-1"})
        again = client.post("/v1/retention/sweeps", json={"dry_run": True}, headers={"Idempotency-Key": "sweep-1"})
        run = client.post("/v1/retention/sweeps", json={"dry_run": False, "plan": accepted.json()["id"]})
        shown = client.get(accepted.json()["url"], params={"limit": 1, "after": "m-0"}).json()
        unknown = client.get("/v1/retention/sweeps/unknown")
        muddled = client.post("/v1/retention/sweeps", json={"dry_run": True, "plan": "x"})
    assert (accepted.status_code, accepted.json()) == (202, again.json())
    assert (shown["status"], shown["has_more"], shown["next_cursor"]) == ("planned", True, "m-1")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "sweep_not_found")
    assert (muddled.status_code, muddled.json()["error"]["param"]) == (400, "plan")
    commands = eventually_blocking(lambda: [said for said in gateway.peer.of(SweepRequested) if said.data["sweep_id"] == run.json()["id"]])
    assert commands[0].data["plan_id"] == accepted.json()["id"]
    assert "deadline" not in commands[0].attributes
    asked = gateway.peer.of(SweepInspected)[0]
    planned = next(said for said in gateway.peer.of(SweepRequested) if said.data["sweep_id"] == asked.data["sweep_id"])
    assert planned.key == asked.key


def test_sweeps_and_validations_are_cancelled_behind_their_requests(gateway: Any) -> None:
    problem = Problem(code="validation_cancelled", message="The validation was cancelled.", status=409)
    ended = {"state": "failed", "created_at": NOW, "finished_at": NOW, "problem": problem}
    gateway.peer.on(ValidationCancelled, lambda heard: [ValidationReported(validation_id=heard.data["validation_id"], **ended)])
    counts = {"dry_run": False, "policy_version": 1, "planned": 1, "archived": 0, "skipped": 0}
    gateway.peer.on(SweepCancelled, lambda heard: [SweepReported(sweep_id=heard.data["sweep_id"], **counts, **ended)])
    with gateway.http() as client:
        sweep = client.post("/v1/retention/sweeps", json={"dry_run": False}).json()
        told = [client.post(f"{url}/cancel") for url in (sweep["url"], "/v1/validations/v-9")]
    assert [(answer.status_code, answer.json()["status"]) for answer in told] == [(200, "failed")] * 2
    assert told[1].json()["problem"]["code"] == "validation_cancelled"
    cancelled = gateway.peer.of(SweepCancelled)[-1]
    requested = eventually_blocking(lambda: [said for said in gateway.peer.of(SweepRequested) if said.data["sweep_id"] == sweep["id"]])
    assert requested[0].key == cancelled.key, "one key, one order"


def test_a_dataset_is_uploaded_and_judged(gateway: Any) -> None:
    gateway.peer.on(
        ValidationInspected, lambda heard: [ValidationReported(validation_id=heard.data["validation_id"], state="queued", created_at=NOW)]
    )
    with gateway.http() as client:
        uploaded = client.post("/v1/datasets", files={"file": ("iris.csv", b"a,b\n1,2\n")}, headers={"Idempotency-Key": "data-1"})
        again = client.post("/v1/datasets", files={"file": ("iris.csv", b"a,b\n1,2\n")}, headers={"Idempotency-Key": "data-1"})
        other = client.post("/v1/datasets", files={"file": ("iris.csv", b"a,b\n3,4\n")}, headers={"Idempotency-Key": "data-1"})
        dataset = uploaded.json()
        accepted = client.post("/v1/validations", json={"dataset": dataset["id"], "reference": dataset["id"]})
        unknown = client.post("/v1/validations", json={"dataset": dataset["id"], "reference": "none"})
        shown = client.get(accepted.json()["url"]).json()
    assert (uploaded.status_code, dataset["format"], dataset["size_bytes"]) == (201, "csv", 8)
    assert again.json() == dataset
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert (accepted.status_code, shown["status"], shown["report"]) == (202, "queued", None)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "reference")
    command = eventually_blocking(lambda: gateway.peer.of(ValidationRequested))[0]
    stored = gateway.process.folder / "objects" / command.data["candidate"]["object_key"]
    assert stored.read_bytes() == b"a,b\n1,2\n"


@pytest.mark.parametrize(
    ("files", "status", "code"),
    [
        ({"file": ("iris.xlsx", b"x")}, 400, "unsupported_format"),
        ({"file": ("iris.csv", b"")}, 400, "empty_file"),
        ({"other": ("iris.csv", b"x")}, 400, "missing_required_parameter"),
        ({"file": ("iris.csv", b"x" * 2_000_001)}, 413, "request_too_large"),
    ],
)
def test_an_upload_that_is_refused(gateway: Any, files: Any, status: int, code: str) -> None:
    with gateway.http() as client:
        response = client.post("/v1/datasets", files=files)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_dataset_of_another_tenant_does_not_exist(gateway: Any) -> None:
    with gateway.http() as client:
        dataset = client.post("/v1/datasets", files={"file": ("iris.csv", b"a\n1\n")}).json()
        client.post("/v1/tenants", json={"id": "stranger"})
        key = client.post("/v1/keys", json={"tenant_id": "stranger", "name": "x"}).json()["key"]
    with gateway.http(key=key) as client:
        response = client.post("/v1/validations", json={"dataset": dataset["id"]})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "dataset_not_found")
