"""Consistency tokens, and the asking again until an answer is fresh."""

import asyncio
import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.contracts.errors import Problem
from tessera.contracts.events import (
    AwaitedWrite,
    ConsistencyLevel,
    Freshness,
    FreshnessInspected,
    FreshnessReported,
    LogEnd,
    LogPlace,
    ReadConsistency,
    RecallCompleted,
    RecallRequested,
)
from tessera.gateway.domain.consistency import LIFETIME, LONGEST_TOKEN, Token, Tokens, merged
from tessera.gateway.domain.errors import ApiError, timed_out
from tessera.gateway.handlers import consistency as module
from tessera.gateway.handlers.consistency import Fresh, asked, awaited, checked
from tessera.gateway.ports import Call

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 27, 23, tzinfo=UTC)
TENANT = "acme"
TOKENS = Tokens(b"secret")

numbers = st.integers(0, 2**31 - 1)
digests = st.binary(min_size=16, max_size=16).map(bytes.hex)
topics = st.sampled_from(["ingest", "ingest.acme"])
places = st.builds(LogPlace, topic=topics, partition=numbers, offset=st.integers(0, 2**63 - 1))
writes = st.builds(AwaitedWrite, identity=digests, body=digests, place=st.none() | places)
ends = st.builds(LogEnd, topic=topics, partition=numbers, next_offset=st.integers(0, 2**63 - 1))
tokens = st.builds(Token, st.lists(writes, max_size=4).map(tuple), st.lists(ends, max_size=4).map(tuple))


def read(text: str, tenant_id: str = TENANT, *, secrets: Tokens = TOKENS, now: datetime = NOW) -> Token:
    return secrets.read(tenant_id, text, param="consistency.token", now=now)


def code_of(text: str, **more: Any) -> str:
    with pytest.raises(ApiError) as raised:
        read(text, **more)
    assert (raised.value.status, raised.value.param) == (400, "consistency.token")
    return raised.value.code


@settings(deadline=None)
@given(tokens)
def test_a_token_survives_being_issued_and_read(token: Token) -> None:
    assert read(TOKENS.issued(TENANT, token, now=NOW)) == token


@settings(deadline=None)
@given(tokens, st.integers(min_value=0), st.characters())
def test_a_changed_character_is_noticed(token: Token, position: int, other: str) -> None:
    text = TOKENS.issued(TENANT, token, now=NOW)
    place = position % len(text)
    changed = text[:place] + other + text[place + 1 :]
    assert changed == text or code_of(changed) == "consistency_token_invalid"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_what_was_never_issued_is_refused(text: str) -> None:
    assert code_of(text) == "consistency_token_invalid"


def test_a_token_is_its_tenants_and_its_platforms_alone() -> None:
    text = TOKENS.issued(TENANT, Token(), now=NOW)
    assert code_of(text, tenant_id="other") == "consistency_token_invalid"
    assert code_of(text, secrets=Tokens(b"another")) == "consistency_token_invalid"
    assert code_of(text, now=NOW - timedelta(minutes=6)) == "consistency_token_invalid"


def test_a_token_lives_as_long_as_the_log_keeps_what_it_may_wait_for() -> None:
    text = TOKENS.issued(TENANT, Token(), now=NOW)
    assert read(text, now=NOW + LIFETIME) == Token()
    assert code_of(text, now=NOW + LIFETIME + timedelta(seconds=1)) == "consistency_token_expired"


def test_a_token_tells_nothing_of_whom_it_is_for() -> None:
    write = AwaitedWrite(identity="ab" * 16, body="cd" * 16, place=LogPlace(topic="ingest.acme", partition=1, offset=2))
    foreign = LogEnd(topic="ingest.other", partition=0, next_offset=5)
    raw = bytes_of(TOKENS.issued(TENANT, Token((write,), (foreign,)), now=NOW))
    assert b"acme" not in raw
    assert b"ingest" not in raw
    assert read(TOKENS.issued(TENANT, Token((write,), (foreign,)), now=NOW)) == Token((write,))


def bytes_of(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_the_token_of_a_full_batch_fits() -> None:
    many = tuple(AwaitedWrite(identity=f"{number:032x}", body="0" * 32) for number in range(500))
    assert len(TOKENS.issued(TENANT, Token(many), now=NOW)) < LONGEST_TOKEN


def test_several_tokens_are_waited_for_together_up_to_a_limit() -> None:
    early, late = (LogEnd(topic="ingest", partition=0, next_offset=end) for end in (3, 7))
    write = AwaitedWrite(identity="0" * 32, body="1" * 32)
    assert merged([Token((write,), (late,)), Token((write,), (early,))], param="p") == Token((write,), (late,))
    many = [
        Token(tuple(AwaitedWrite(identity=f"{number:032x}", body="0" * 32) for number in range(start, start + 500)))
        for start in range(0, 2_500, 500)
    ]
    with pytest.raises(ApiError):
        merged(many, param="p")


# --- asking again -----------------------------------------------------------------------------------


def fresh(standing: str = "satisfied", **more: Any) -> Freshness:
    return Freshness(standing=standing, as_of=NOW, **more)  # type: ignore[arg-type]


def wanted(level: ConsistencyLevel = "read_your_writes", wait: float = 10.0, **more: Any) -> Fresh:
    return Fresh(ReadConsistency(level=level, **more), timedelta(seconds=wait))


def question(consistency: ReadConsistency) -> RecallRequested:
    return RecallRequested(reply_partition=1, query="q", consistency=consistency)


def recalled(freshness: Freshness) -> RecallCompleted:
    return RecallCompleted(memories=(), freshness=freshness)


CALL = Call(TENANT, "request")


async def test_a_question_is_asked_again_when_memory_forgot_it_or_had_no_place(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)
    desk.log.answers += [timed_out("memory"), recalled(fresh("behind")), recalled(fresh("pending")), recalled(fresh())]
    answer = await asked(desk.log, question, wanted(), CALL)
    assert answer == recalled(fresh())
    waits = [data.consistency.wait_seconds for data, _ in desk.log.published]
    assert len(waits) == 4
    assert all(0 < wait <= 4 for wait in waits)


async def test_whoever_asks_again_waits_for_the_end_that_was_found_first(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)
    end = LogEnd(topic="ingest.acme", partition=0, next_offset=7)
    desk.log.answers += [recalled(fresh("behind", awaited=(end,))), recalled(fresh("behind", awaited=(end,))), recalled(fresh())]
    await asked(desk.log, question, wanted("strong"), CALL)
    first, *later = [data.consistency for data, _ in desk.log.published]
    assert first.level == "strong"
    assert [(one.level, one.ends, one.maximum_age_seconds) for one in later] == [("read_your_writes", (end,), None)] * 2


@pytest.mark.parametrize("final", [fresh("refused", waiting_may_help=False), fresh("pending", waiting_may_help=False)])
async def test_what_waiting_cannot_change_is_not_asked_again(desk: Any, final: Freshness) -> None:
    desk.log.answers.append(recalled(final))
    assert await asked(desk.log, question, wanted(), CALL) == recalled(final)


async def test_the_wait_ends_at_its_limit(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)
    desk.log.answers += [recalled(fresh("behind"))] * 1_000
    began = asyncio.get_running_loop().time()
    assert await asked(desk.log, question, wanted(wait=0.1), CALL) == recalled(fresh("behind"))
    assert asyncio.get_running_loop().time() - began >= 0.1
    desk.log.answers[:] = [timed_out("memory")]
    with pytest.raises(ApiError):
        await asked(desk.log, question, wanted(wait=0), CALL)


@pytest.mark.parametrize(
    ("standing", "status", "code"),
    [("behind", 503, "not_up_to_bound"), ("pending", 503, "write_pending"), ("refused", 409, "write_refused")],
)
def test_what_is_not_fresh_is_an_error_with_the_reason(standing: str, status: int, code: str) -> None:
    with pytest.raises(ApiError) as raised:
        checked(fresh(standing, reason=Problem(code="event_id_reused", message="Twice.")))
    assert (raised.value.status, raised.value.code, raised.value.retry_after is None) == (status, code, status == 409)
    if standing != "behind":
        assert "event_id_reused: Twice." in raised.value.message


async def test_a_generation_carries_what_was_reached_so_that_memory_can_prove_it_again(desk: Any) -> None:
    reached = LogEnd(topic="ingest.acme", partition=0, next_offset=7)
    desk.log.answers.append(FreshnessReported(freshness=fresh(ends=(reached,))))
    proved, freshness = await awaited(desk.log, wanted("strong"), CALL)
    assert proved == ReadConsistency(level="read_your_writes", ends=(reached,), stage=None)
    assert freshness == fresh(ends=(reached,))
    ((asked_for, _),) = desk.log.published
    assert isinstance(asked_for, FreshnessInspected)


async def test_a_search_with_a_token_waits_for_what_the_write_was(desk: Any) -> None:
    item = {"type": "message", "id": "m-1", "conversation_id": "c", "role": "user", "content": "x"}
    async with desk.client() as client:
        token = (await client.post("/v1/memories", json=item)).json()["consistency"]["token"]
        desk.log.answers.append(recalled(fresh(searchable="words", ends=(LogEnd(topic="ingest.default", partition=0, next_offset=1),))))
        body = {"query": "q", "consistency": {"level": "read_your_writes", "token": token, "wait_seconds": 3}}
        answer = (await client.post("/v1/memories/search", json=body)).json()
    (sent,) = desk.log.sent
    (request,) = [data for data, _ in desk.log.published if isinstance(data, RecallRequested)]
    (write,) = request.consistency.writes
    assert write.place == LogPlace(topic="ingest.default", partition=0, offset=0)
    assert (request.consistency.level, request.consistency.stage) == ("read_your_writes", "words")
    assert request.consistency.wait_seconds == pytest.approx(3, abs=0.5)
    assert sent.event_id == "m-1"
    assert (answer["consistency"]["level"], answer["consistency"]["searchable"]) == ("read_your_writes", "words")
    assert Tokens(b"pepper").read("default", answer["consistency"]["token"], param="p").ends[0].next_offset == 1


async def test_a_chat_that_is_not_fresh_begins_nothing(desk: Any) -> None:
    desk.log.answers.append(FreshnessReported(freshness=fresh("refused", waiting_may_help=False)))
    memory = {"consistency": {"level": "strong", "wait_seconds": 0}}
    body = {"model": "chat", "messages": [{"role": "user", "content": "q"}], "tessera": {"memory": memory}}
    async with desk.client() as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "write_refused")
    assert [type(data) for data, _ in desk.log.published] == [FreshnessInspected]
