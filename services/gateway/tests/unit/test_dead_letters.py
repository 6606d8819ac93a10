"""Deciding about dead letters, without a log."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus.deadletters import DeadLetter, as_dead_letter, dead_letter
from tessera.contracts.errors import InvalidError
from tessera.gateway.domain import errors
from tessera.gateway.domain.contents import as_json, as_text

pytestmark = pytest.mark.unit


class Record:
    topic, partition, timestamp = "ingest", 2, 0

    def __init__(self, value: bytes, headers: Any, key: bytes | None, offset: int) -> None:
        self.value, self.headers, self.key, self.offset = value, headers, key, offset


def letter(number: int, *, value: bytes = b'{"a": 1}', traceparent: bytes = b"00-abc-def-01") -> DeadLetter:
    headers = [("ce_id", str(number).encode()), ("ce_traceparent", traceparent), ("odd", b"\xff")]
    row = dead_letter(Record(value, headers, None, number), "ingest", "memory", InvalidError("data_invalid", "why"), 1)
    return as_dead_letter(Record(row.encoded.value, row.encoded.headers, row.key, number), row.topic)


@pytest.fixture
def two(desk: Any) -> list[str]:
    desk.rooms.dead_letters.all = [letter(0), letter(1)]
    return [one.summary.id for one in desk.rooms.dead_letters.all]


async def decide(desk: Any, action: str, **body: Any) -> dict[str, str]:
    async with desk.client() as client:
        answer = await client.post(f"/v1/dead-letters/{action}", json=body)
    assert answer.status_code == 200, answer.text
    return {one["id"]: one["result"] for one in answer.json()["data"]}


async def test_the_first_decision_stands(desk: Any, two: list[str]) -> None:
    first, second = two
    assert await decide(desk, "replay", ids=[first]) == {first: "replayed"}
    assert await decide(desk, "discard", filter={}) == {second: "discarded"}
    assert await decide(desk, "replay", ids=two) == {first: "already_replayed", second: "already_discarded"}
    assert await decide(desk, "discard", ids=[*two, "none"]) == {
        first: "already_replayed",
        second: "already_discarded",
        "none": "not_found",
    }
    assert desk.rooms.dead_letters.replayed == [first]


async def test_copies_of_a_letter_in_one_order_are_decided_once(desk: Any) -> None:
    original = letter(0)
    place = original.summary.place
    copies = [replace(original, summary=replace(original.summary, place=place._replace(offset=number))) for number in range(25)]
    desk.rooms.dead_letters.all = [*copies, *(letter(number) for number in range(100, 125))]
    ids = [one.summary.id for one in desk.rooms.dead_letters.all]
    results = await decide(desk, "replay", ids=ids)
    assert [results[one] for one in ids] == ["replayed", *["already_replayed"] * 24, *["replayed"] * 25]
    assert desk.rooms.dead_letters.replayed == [ids[0], *ids[25:]]
    assert sorted(desk.trail.told) == sorted([("dead_letter.replay", "attempted"), ("dead_letter.replay", "succeeded")] * 26)


@pytest.mark.parametrize(("action", "result"), [("replay", "would_be_replayed"), ("discard", "would_be_discarded")])
async def test_a_dry_run_changes_nothing(desk: Any, two: list[str], action: str, result: str) -> None:
    assert await decide(desk, action, filter={}, dry_run=True) == dict.fromkeys(two, result)
    assert (desk.rooms.dead_letters.replayed, desk.rooms.decisions.rows) == ([], {})


async def test_what_cannot_be_replayed_stays_pending_and_says_why(desk: Any, two: list[str]) -> None:
    desk.rooms.dead_letters.refuses = errors.in_doubt()
    async with desk.client() as client:
        answer = (await client.post("/v1/dead-letters/replay", json={"ids": two})).json()
        pending = (await client.get("/v1/dead-letters")).json()["data"]
    assert answer["counts"] == {"failed": 2}
    assert {one["error"]["code"] for one in answer["data"]} == {"dependency_unavailable"}
    assert [one["id"] for one in pending] == two


async def test_letters_are_listed_by_what_was_decided(desk: Any, two: list[str]) -> None:
    await decide(desk, "discard", ids=two[:1])
    async with desk.client() as client:
        found = {
            status: [one["id"] for one in (await client.get("/v1/dead-letters", params={"status": status})).json()["data"]]
            for status in ("pending", "discarded", "replayed", "all")
        }
    assert found == {"pending": two[1:], "discarded": two[:1], "replayed": [], "all": two}


@pytest.mark.parametrize(("traceparent", "trace_id"), [(b"00-abc-def-01", "abc"), (b"nonsense", None)])
async def test_a_letter_is_shown_whole(desk: Any, traceparent: bytes, trace_id: str | None) -> None:
    desk.rooms.dead_letters.all = [letter(0, traceparent=traceparent)]
    async with desk.client() as client:
        shown = (await client.get("/v1/dead-letters/ingest.memory.dlq:2:0")).json()
        missing = await client.get("/v1/dead-letters/ingest.memory.dlq:2:1")
    assert (shown["trace_id"], shown["key"], shown["value"]["json"]) == (trace_id, None, {"a": 1})
    assert shown["headers"][-1] == {"name": "odd", "base64": "/w==", "text": None}
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "dead_letter_not_found")


@given(st.binary())
def test_any_bytes_can_be_shown(content: bytes) -> None:
    text = as_text(content)
    assert text is None or text.encode() == content
    json.dumps(as_json(content), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "content", [b"NaN", b"1e999", b'"\\ud800"', b"[" * 65 + b"]" * 65, b"[" * 100_000, b"\xff", b""], ids=lambda one: repr(one[:9])
)
def test_json_that_could_not_be_written_again_is_not_shown_as_json(content: bytes) -> None:
    assert as_json(content) is None
