"""The HTTP face in one process: the OpenAPI document, scopes, and errors that nobody foresaw."""

import asyncio
import dataclasses
import hashlib
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tessera.contracts.errors import InvalidError, RetryableError
from tessera.contracts.events import EmbeddingCompleted, IngestionReported, RecallCompleted, TokenizationCompleted
from tessera.gateway.adapters.spool import DiskSpool, SpoolLimits
from tessera.gateway.domain.errors import ApiError, unavailable
from tessera.gateway.domain.keys import SCOPES
from tessera.gateway.domain.spool import AcceptedEvent
from tessera.gateway.handlers.handoff import Handoff
from tessera.gateway.routes.application import api, api_routes
from tessera.gateway.routes.context import required_scope
from tessera.gateway.routes.edge import EdgeLimits
from tessera.resilience import CircuitOpenError, TimedOutError

pytestmark = pytest.mark.unit

SCOPE_OF = {
    ("POST", "/v1/chat/completions"): "inference",
    ("POST", "/v1/completions"): "inference",
    ("GET", "/v1/models"): "inference",
    ("GET", "/v1/chat/completions"): "inference",
    ("GET", "/v1/chat/completions/{completion_id}"): "inference",
    ("GET", "/v1/chat/completions/{completion_id}/messages"): "inference",
    ("POST", "/v1/chat/completions/{completion_id}"): "inference",
    ("DELETE", "/v1/chat/completions/{completion_id}"): "inference",
    ("GET", "/v1/models/{model}"): "inference",
    ("DELETE", "/v1/models/{model}"): "inference",
    ("GET", "/v1/generations"): "inference",
    ("GET", "/v1/generations/{generation_id}"): "inference",
    ("POST", "/v1/generations/{generation_id}/cancel"): "inference",
    ("GET", "/v1/generations/{generation_id}/events"): "inference",
    ("GET", "/v1/usage"): "usage",
    ("GET", "/v1/usage/calls"): "usage",
    ("POST", "/v1/embeddings"): "inference",
    ("POST", "/v1/tokenize"): "inference",
    ("POST", "/v1/detokenize"): "inference",
    ("POST", "/v1/memories"): "memory:write",
    ("POST", "/v1/memories/batch"): "memory:write",
    ("GET", "/v1/ingest/{event_id}"): "memory:read",
    ("POST", "/v1/memories/search"): "memory:read",
    ("PUT", "/v1/retention/policy"): "retention",
    ("GET", "/v1/retention/policy"): "retention",
    ("POST", "/v1/retention/sweeps"): "retention",
    ("GET", "/v1/retention/sweeps/{sweep_id}"): "retention",
    ("POST", "/v1/retention/sweeps/{sweep_id}/cancel"): "retention",
    ("POST", "/v1/datasets"): "validation",
    ("POST", "/v1/validations"): "validation",
    ("GET", "/v1/validations/{validation_id}"): "validation",
    ("POST", "/v1/validations/{validation_id}/cancel"): "validation",
    ("POST", "/v1/tenants"): "admin",
    ("GET", "/v1/tenants"): "admin",
    ("POST", "/v1/keys"): "admin",
    ("GET", "/v1/keys"): "admin",
    ("POST", "/v1/keys/{key_id}/rotate"): "admin",
    ("DELETE", "/v1/keys/{key_id}"): "admin",
    ("POST", "/v1/services/{service}/control"): "admin",
    ("GET", "/v1/status"): "admin",
    ("GET", "/v1/dead-letters"): "admin",
    ("GET", "/v1/dead-letters/{letter_id}"): "admin",
    ("POST", "/v1/dead-letters/replay"): "admin",
    ("POST", "/v1/dead-letters/discard"): "admin",
    ("GET", "/v1/spool"): "admin",
    ("POST", "/v1/spool/replay"): "admin",
    ("GET", "/v1/audit"): "audit",
    ("GET", "/health"): None,
}


def test_every_route_asks_for_the_scope_in_the_table(desk: Any) -> None:
    document = api(desk.rooms).openapi()
    described = {
        (method.upper(), path): operation.get("x-required-scope")
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert described == SCOPE_OF
    assert {required_scope(route) for route in api_routes()} == {*SCOPES, None}


@pytest.mark.parametrize(("method", "path"), [where for where, scope in SCOPE_OF.items() if scope])
async def test_a_key_without_the_scope_is_refused_before_anything_else(desk: Any, method: str, path: str) -> None:
    others = [scope for scope in SCOPES if scope != SCOPE_OF[method, path]]
    async with desk.client(desk.new_key(*others)) as client:
        refused = await client.request(method, path.replace("{", "").replace("}", ""), json=None if method == "GET" else {})
        unknown = await client.request(method, path.replace("{", "").replace("}", ""), headers={"authorization": ""})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "missing_api_key")
    assert unknown.headers["www-authenticate"] == "Bearer"


def test_the_document_is_openapi_3_1_with_examples_and_the_error_object(desk: Any) -> None:
    document = api(desk.rooms).openapi()
    schemas = document["components"]["schemas"]
    assert document["openapi"].startswith("3.1")
    assert "HTTPValidationError" not in schemas
    assert set(schemas["ErrorDetail"]["required"]) == {"message", "type", "param", "code"}
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    refusals = [answer for operation in operations for status, answer in operation["responses"].items() if status >= "400"]
    assert {answer["content"]["application/json"]["schema"]["$ref"] for answer in refusals} - {"#/components/schemas/HealthView"} == {
        "#/components/schemas/ErrorBody"
    }
    for name in (
        "ChatCompletionBody",
        "CompletionBody",
        "EmbeddingBody",
        "TokenizeBody",
        "SearchBody",
        "BatchBody",
        "SweepBody",
        "KeyBody",
    ):
        validator = Draft202012Validator({**schemas[name], "components": document["components"]})
        for example in schemas[name]["examples"]:
            validator.validate(example)


def test_every_answer_has_an_example_that_fits_its_schema(desk: Any) -> None:
    document = api(desk.rooms).openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                if not status.startswith("2") or "application/json" not in answer.get("content", {}):
                    continue
                described = answer["content"]["application/json"]
                assert described.get("example") is not None, f"{method} {path}"
                Draft202012Validator({**described["schema"], "components": document["components"]}).validate(described["example"])


def test_every_request_body_has_an_example_that_fits_its_schema(desk: Any) -> None:
    document = api(desk.rooms).openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for described in operation.get("requestBody", {}).get("content", {}).values():
                schema = described["schema"]
                named = [
                    document["components"]["schemas"][one["$ref"].rpartition("/")[2]]
                    for one in schema.get("oneOf", [schema])
                    if "$ref" in one
                ]
                examples = [example for one in (schema, *named) for example in one.get("examples", [])]
                examples += [example["value"] for example in described.get("examples", {}).values()]
                assert examples, f"{method} {path}"
                for example in examples:
                    Draft202012Validator({**schema, "components": document["components"]}).validate(example)


def test_the_uploaded_example_is_the_one_that_the_answer_tells_of(desk: Any) -> None:
    upload = api(desk.rooms).openapi()["paths"]["/v1/datasets"]["post"]
    (sent,) = upload["requestBody"]["content"]["multipart/form-data"]["examples"].values()
    answered = upload["responses"]["201"]["content"]["application/json"]["example"]
    data = sent["value"]["file"].encode()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (answered["size_bytes"], answered["sha256"])


async def test_the_document_is_served(desk: Any) -> None:
    async with desk.client() as client:
        assert (await client.get("/openapi.json")).json()["info"]["title"] == "Tessera"


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (RuntimeError("inner secret"), 500, "internal_error"),
        (RetryableError("gone"), 503, "dependency_unavailable"),
        (CircuitOpenError("postgres", timedelta(seconds=1)), 503, "dependency_unavailable"),
        (TimedOutError("late"), 504, "timed_out"),
        (InvalidError("event_id_reused", "Other body."), 400, "event_id_reused"),
        (ApiError(429, "rate_limited", "Slow down.", retry_after=timedelta(milliseconds=10)), 429, "rate_limited"),
    ],
)
async def test_whatever_goes_wrong_is_the_error_object(desk: Any, raised: Exception, status: int, code: str) -> None:
    desk.log.answers.append(raised)
    async with desk.client() as client:
        response = await client.post("/v1/memories/search", json={"query": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "inner secret" not in response.text
    assert response.headers["x-request-id"]
    assert ("retry-after" in response.headers) == (status in {429, 503})


async def test_when_the_log_is_down_ingestion_is_503_and_nothing_is_said_to_be_accepted(desk: Any) -> None:
    desk.log.rejects = lambda _: unavailable("The event log")
    item = {"type": "message", "conversation_id": "c", "role": "user", "content": "x"}
    async with desk.client() as client:
        single = await client.post("/v1/memories", json=item)
        batch = await client.post("/v1/memories/batch", json={"items": [item, item]})
    for response in (single, batch):
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")


async def test_a_batch_that_fails_in_part_says_which(desk: Any) -> None:
    def rejects(event: AcceptedEvent) -> ApiError | None:
        return unavailable("The event log") if b"unlucky" in event.value else None

    desk.log.rejects = rejects
    items = [{"type": "message", "conversation_id": "c", "role": "user", "content": text} for text in ("lucky", "unlucky")]
    async with desk.client() as client:
        body = (await client.post("/v1/memories/batch", json={"items": items})).json()
    assert [(item["status"], item["error"] and item["error"]["code"]) for item in body["data"]] == [
        ("accepted", None),
        ("failed", "dependency_unavailable"),
    ]


async def test_an_event_that_is_too_large_is_413(desk: Any) -> None:
    item = {"type": "document", "document_id": "d", "content": "ä" * 480_000}
    async with desk.client() as client:
        response = await client.post(
            "/v1/memories", content=json.dumps(item, ensure_ascii=False).encode(), headers={"content-type": "application/json"}
        )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "event_too_large")


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/chat/completions", {"model": "none", "messages": [{"role": "user", "content": "x"}]}, "model_not_found", None),
        ("/v1/chat/completions", {"model": "text", "messages": [{"role": "user", "content": "x"}]}, "unsupported_model", "model"),
        ("/v1/completions", {"model": "text", "prompt": ["a", "b"]}, "unsupported_value", "prompt"),
        ("/v1/embeddings", {"model": "vectors", "input": [-1]}, "integer_below_min_value", "input[0]"),
        ("/v1/embeddings", {"model": "vectors", "input": []}, "empty_array", "input"),
        ("/v1/tokenize", {"text": "x", "model": "chat", "encoding": "e"}, "invalid_value", "encoding"),
        ("/v1/keys", {"name": "x", "scopes": []}, "empty_array", "scopes"),
        ("/v1/keys", {"name": "x", "expires_at": "2020-01-01T00:00:00Z"}, "invalid_value", "expires_at"),
        ("/v1/tenants", {"id": "No Capitals"}, "invalid_value", "id"),
    ],
)
async def test_what_a_request_gets_wrong_is_named(desk: Any, path: str, body: dict[str, Any], code: str, param: str | None) -> None:
    async with desk.client() as client:
        error = (await client.post(path, json=body)).json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


async def test_dimensions_other_than_the_models_are_refused(desk: Any) -> None:
    desk.log.answers = [EmbeddingCompleted(model="vectors", vectors=((1.0, 0.0),), token_counts=(1,))] * 2
    async with desk.client() as client:
        right = await client.post("/v1/embeddings", json={"model": "vectors", "input": "x", "dimensions": 2})
        wrong = await client.post("/v1/embeddings", json={"model": "vectors", "input": "x", "dimensions": 3})
    assert (right.status_code, wrong.status_code, wrong.json()["error"]["param"]) == (200, 400, "dimensions")


async def test_an_answer_of_another_kind_is_a_fault_of_ours(desk: Any) -> None:
    desk.log.answers = [RecallCompleted(memories=())]
    async with desk.client() as client:
        assert (await client.post("/v1/tokenize", json={"text": "x"})).status_code == 500


async def test_the_encoding_comes_from_the_model_or_the_default(desk: Any) -> None:
    done = TokenizationCompleted(operation="encode", encoding="o200k_base", text="x", tokens=(1,))
    desk.log.answers = [done, done]
    async with desk.client() as client:
        await client.post("/v1/tokenize", json={"text": "x"})
        await client.post("/v1/tokenize", json={"text": "x", "encoding": "cl100k_base"})
    assert [data.encoding for data, _ in desk.log.published] == ["o200k_base", "cl100k_base"]


async def test_a_small_limit_of_the_body(desk: Any) -> None:
    async with desk.client(limits=EdgeLimits(body_bytes=10)) as client:
        assert (await client.post("/v1/tokenize", json={"text": "longer than ten"})).status_code == 413


async def test_what_is_spooled_is_said_so_everywhere(desk: Any, tmp_path: Path) -> None:
    store = DiskSpool(tmp_path, SpoolLimits(1024 * 1024, 1024 * 1024, timedelta(0)))
    rooms = dataclasses.replace(desk.rooms, handoff=Handoff(desk.log, store), instance="gateway-1")
    desk.rooms = rooms
    desk.log.rejects = lambda _: unavailable("The event log")
    items = [{"type": "message", "id": f"m-{number}", "conversation_id": "c", "role": "user", "content": "x"} for number in range(3)]
    async with desk.client() as client:
        single = (await client.post("/v1/memories", json=items[0])).json()
        batch = (await client.post("/v1/memories/batch", json={"items": items[1:]})).json()
        state = (await client.get("/v1/ingest/m-1")).json()
        page = (await client.get("/v1/spool", params={"limit": 2})).json()
        rest = (await client.get("/v1/spool", params={"limit": 2, "after": page["next_cursor"]})).json()
        status = (await client.get("/v1/status")).json()
        desk.log.openings = 0
        replayed = (await client.post("/v1/spool/replay", json={"event_ids": ["m-0", "nobody"]})).json()
    await store.close()
    assert (single["status"], batch["spooled"], batch["accepted"], state["status"]) == ("spooled", 2, 0, "spooled")
    assert [entry["event_id"] for entry in (*page["data"], *rest["data"])] == ["m-0", "m-1", "m-2"]
    assert (page["instance"], page["has_more"], rest["has_more"], rest["next_cursor"]) == ("gateway-1", True, False, None)
    assert (status["spool"], page["spool"]["records"]) == (page["spool"], 3)
    assert page["data"][0]["expires_at"] > page["data"][0]["accepted_at"]
    assert replayed["data"] == [{"event_id": "m-0", "status": "waiting"}, {"event_id": "nobody", "status": "not_found"}]


async def test_a_tenant_is_not_told_of_anothers_spooled_event(desk: Any, tmp_path: Path) -> None:
    store = DiskSpool(tmp_path, SpoolLimits(1024 * 1024, 1024 * 1024, timedelta(0)))
    desk.rooms = dataclasses.replace(desk.rooms, handoff=Handoff(desk.log, store))
    desk.log.rejects = lambda _: unavailable("The event log")
    desk.log.answers = [IngestionReported(event_id="m", state="unknown")]
    async with desk.client() as client, desk.client(desk.new_key("memory:read", tenant_id="other")) as stranger:
        await client.post("/v1/memories", json={"type": "message", "id": "m", "conversation_id": "c", "role": "user", "content": "x"})
        assert (await stranger.get("/v1/ingest/m")).json()["status"] == "unknown"
    await store.close()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/chat/completions", "GET, POST"),
        ("/v1/chat/completions/chatcmpl-1", "DELETE, GET, POST"),
        ("/v1/dead-letters/discard", "POST"),
        ("/v1/models/local/quote", "DELETE, GET"),
        ("/health", "GET"),
    ],
)
async def test_what_may_be_done_at_a_path_is_told_with_a_refusal(desk: Any, path: str, allowed: str) -> None:
    async with desk.client() as client:
        answer = await client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/v1/memories", {"weight": False}, "weight"),
        ("POST", "/v1/memories", {"weight": "1"}, "weight"),
        ("POST", "/v1/memories", {"valid_from": 0}, "valid_from"),
        ("POST", "/v1/memories", {"valid_from": "2026-01-01"}, "valid_from"),
        ("POST", "/v1/memories", {"valid_to": "0.5"}, "valid_to"),
        ("PUT", "/v1/retention/policy", {"max_age_days": "1"}, "max_age_days"),
        ("PUT", "/v1/retention/policy", {"importance_threshold": True}, "importance_threshold"),
        ("POST", "/v1/keys", {"name": "x", "expires_at": 4_000_000_000}, "expires_at"),
    ],
)
async def test_what_json_tells_apart_is_told_apart(desk: Any, method: str, path: str, body: dict[str, Any], param: str) -> None:
    relation = {"type": "relation", "source_entity_id": "a", "relation": "r", "target_entity_id": "b"} if path == "/v1/memories" else {}
    async with desk.client() as client:
        answer = await client.request(method, path, json={**relation, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_moments_are_taken_as_rfc_3339_has_them(desk: Any) -> None:
    relation = {"type": "relation", "source_entity_id": "a", "relation": "r", "target_entity_id": "b", "weight": 0.5}
    async with desk.client() as client:
        answer = await client.post("/v1/memories", json={**relation, "valid_from": "2026-01-01T00:00:00+02:00", "valid_to": None})
    assert answer.status_code == 202
    assert json.loads(desk.log.sent[0].value)["valid_from"] == "2025-12-31T22:00:00Z"


async def test_a_whole_number_may_be_written_with_a_fraction_of_nothing(desk: Any) -> None:
    async with desk.client() as client:
        answer = await client.post("/v1/chat/completions", json={"model": "none", "messages": [{"role": "user", "content": "x"}], "n": 1.0})
        broken = await client.post("/v1/chat/completions", json={"model": "none", "messages": [{"role": "user", "content": "x"}], "n": 1.5})
    assert (answer.json()["error"]["code"], broken.json()["error"]["param"]) == ("model_not_found", "n")


async def test_a_cancellation_that_leaked_from_a_library_is_a_500_with_the_error_object(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(_: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(type(desk.rooms.models), "all", leaking)
    async with desk.client() as client:
        answer = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"]


async def test_answers_over_tls_ask_browsers_to_stay_with_it(desk: Any) -> None:
    async with desk.client() as client:
        plain, encrypted = await client.get("/health"), await client.get("https://gateway/nowhere")
    assert "strict-transport-security" not in plain.headers
    assert encrypted.headers["strict-transport-security"] == "max-age=31536000"
