"""What is put on record, and that nothing administrative is without."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from tessera.bus.deadletters import as_dead_letter, dead_letter
from tessera.contracts.errors import InvalidError, RetryableError
from tessera.contracts.events import (
    AuditAction,
    AuditActor,
    AuditEntry,
    AuditInspected,
    AuditRecorded,
    AuditReported,
    AuditTarget,
    PolicyReported,
    SweepReported,
)
from tessera.gateway.domain import audit, errors, keys
from tessera.gateway.domain.audit import ACTIONS_OF, Actor
from tessera.gateway.handlers.auditing import REMEMBERED_REFUSALS, Refusals, on_record
from tessera.gateway.routes.application import api
from tessera.gateway.workers import every
from tessera.resilience import CircuitOpenError

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 20, tzinfo=UTC)
ACT = audit.record(Actor("key", "k", "default"), "policy.set", tenant_id="default", target=AuditTarget(kind="policy", id="default"))
STUCK = {"topic": "ingest", "partition": 3, "offset": 1742}
SWEPT = SweepReported(
    sweep_id="s", dry_run=True, state="planned", policy_version=1, planned=0, archived=0, skipped=0, created_at=NOW, finished_at=NOW
)


class Record:
    topic, partition, timestamp, value, key, offset = "ingest", 2, 0, b"{}", None, 7
    headers = (("ce_id", b"e"), ("ce_tenantid", b"acme"))


@pytest.fixture
def letter_id(desk: Any) -> str:
    row = dead_letter(Record(), "ingest", "memory", InvalidError("data_invalid", "why"), 1)
    record = type("Letter", (Record,), {"value": row.encoded.value, "headers": row.encoded.headers, "key": row.key})()
    desk.rooms.dead_letters.all = [as_dead_letter(record, row.topic)]
    return str(desk.rooms.dead_letters.all[0].summary.id)


def test_every_operation_that_administers_is_in_the_table(desk: Any) -> None:
    described = {
        (method.upper(), path): operation
        for path, operations in api(desk.rooms).openapi()["paths"].items()
        for method, operation in operations.items()
    }
    changing = {where for where, operation in described.items() if where[0] != "GET"}
    assert {where for where in changing if described[where].get("x-required-scope") in {"admin", "retention"}} == set(ACTIONS_OF)
    assert {where: tuple(described[where].get("x-audit-actions", ())) for where in ACTIONS_OF} == dict(ACTIONS_OF)


def test_every_action_is_of_an_operation_or_a_refusal() -> None:
    of_operations = {action for actions in ACTIONS_OF.values() for action in actions}
    assert of_operations == {action for action in get_args(AuditAction) if not action.endswith(".refused")}


CALLS: Sequence[tuple[tuple[str, str], dict[str, Any] | None, list[tuple[str, str]]]] = [
    (("POST", "/v1/tenants"), {"id": "acme"}, [("tenant.create", "succeeded")]),
    (("POST", "/v1/keys"), {"name": "n"}, [("key.create", "succeeded")]),
    (("POST", "/v1/keys/{key_id}/rotate"), {}, [("key.rotate", "succeeded")]),
    (("DELETE", "/v1/keys/{key_id}"), None, [("key.revoke", "succeeded")]),
    *(
        (("POST", "/v1/services/{service}/control"), body, [(action, "attempted"), (action, "succeeded")])
        for body, action in (
            ({"action": "pause", "consumer": "ingestion"}, "consumer.pause"),
            ({"action": "resume"}, "consumer.resume"),
            ({"action": "reload"}, "service.reload"),
            ({"action": "resume", "parked": {**STUCK, "outcome": "retry"}}, "parked_event.retry"),
            ({"action": "resume", "parked": {**STUCK, "outcome": "discard"}}, "parked_event.discard"),
        )
    ),
    (("POST", "/v1/dead-letters/replay"), {"filter": {}}, [("dead_letter.replay", "attempted"), ("dead_letter.replay", "succeeded")]),
    (("POST", "/v1/dead-letters/discard"), {"filter": {}}, [("dead_letter.discard", "succeeded")]),
    (("POST", "/v1/spool/replay"), {"event_ids": ["m"]}, [("spool.replay", "attempted"), ("spool.replay", "succeeded")]),
    (("PUT", "/v1/retention/policy"), {"max_age_days": 1}, [("policy.set", "attempted"), ("policy.set", "succeeded")]),
    (("POST", "/v1/retention/sweeps"), {"dry_run": True}, [("sweep.start", "attempted"), ("sweep.start", "succeeded")]),
    (("POST", "/v1/retention/sweeps/{sweep_id}/cancel"), None, [("sweep.cancel", "attempted"), ("sweep.cancel", "succeeded")]),
]


@pytest.mark.parametrize(("where", "body", "told"), CALLS, ids=[told[0][0] for _, _, told in CALLS])
async def test_an_act_is_on_record(
    desk: Any, letter_id: str, where: tuple[str, str], body: dict[str, Any] | None, told: list[tuple[str, str]]
) -> None:
    method, path = where
    desk.store.tenants["default"] = None
    desk.log.answers = [SWEPT if "sweeps" in path else PolicyReported(policy=None, version=1)]
    operator = keys.parse(desk.key)
    subject = keys.parse(desk.new_key("inference"))
    assert operator is not None
    assert subject is not None
    async with desk.client() as client:
        answer = await client.request(
            method,
            path.format(key_id=subject.id, service="memory", sweep_id="s"),
            json=body,
            headers={"x-request-id": "req-1"},
        )
    assert answer.is_success, answer.text
    assert desk.trail.told == told
    assert {action for action, _ in told} <= set(ACTIONS_OF[where])
    for act in desk.trail.acts:
        assert act.actor == AuditActor(kind="key", id=operator.id, tenant="default")
        assert (act.request_id, act.client_address) == ("req-1", "127.0.0.1")
        assert act.target is not None


def test_every_operation_of_the_table_was_called() -> None:
    assert {where for where, _, _ in CALLS} == set(ACTIONS_OF)


async def test_where_the_trail_cannot_be_written_nothing_is_done(desk: Any, letter_id: str) -> None:
    desk.trail.away = CircuitOpenError("postgres", errors.RETRY_LATER)
    async with desk.client() as client:
        answers = [
            await client.post("/v1/services/memory/control", json={"action": "pause"}),
            await client.put("/v1/retention/policy", json={"max_age_days": 1}),
            await client.post("/v1/dead-letters/replay", json={"filter": {}}),
        ]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, "dependency_unavailable")] * 3
    assert (desk.log.published, desk.rooms.dead_letters.replayed) == ([], [])


async def test_a_dry_run_is_not_an_act(desk: Any, letter_id: str) -> None:
    async with desk.client() as client:
        for action in ("replay", "discard"):
            await client.post(f"/v1/dead-letters/{action}", json={"filter": {}, "dry_run": True})
    assert desk.trail.acts == []


async def test_a_letter_that_cannot_be_replayed_is_on_record_as_that(desk: Any, letter_id: str) -> None:
    desk.rooms.dead_letters.refuses = errors.in_doubt()
    async with desk.client() as client:
        await client.post("/v1/dead-letters/replay", json={"ids": [letter_id]})
    assert desk.trail.told == [("dead_letter.replay", "attempted"), ("dead_letter.replay", "unknown")]
    assert (desk.trail.acts[1].code, desk.trail.acts[1].tenant, desk.trail.acts[1].target.id) == (
        "dependency_unavailable",
        "acme",
        letter_id,
    )


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (errors.not_found("sweep_not_found", "It"), "refused", "sweep_not_found"),
        (errors.timed_out("It"), "unknown", "timed_out"),
        (RetryableError("gone"), "unknown", "temporarily_unavailable"),
        (RuntimeError("what nobody foresaw"), "unknown", "internal_error"),
    ],
)
async def test_what_came_of_an_act_is_told(desk: Any, error: Exception, outcome: str, code: str) -> None:
    async def fail() -> None:
        async with on_record(desk.trail, ACT):
            assert desk.trail.told == [("policy.set", "attempted")]
            raise error

    with pytest.raises(type(error)):
        await fail()
    assert desk.trail.told[1:] == [("policy.set", outcome)]
    assert desk.trail.acts[1].code == code


async def test_an_outcome_that_cannot_be_written_undoes_nothing(desk: Any) -> None:
    async with on_record(desk.trail, ACT):
        desk.trail.away = RetryableError("gone")
    assert desk.trail.told == [("policy.set", "attempted")]


async def test_refusals_are_told_together(desk: Any) -> None:
    known = keys.parse(desk.key)
    assert known is not None
    forged = keys.ApiKey(known.environment, known.id, keys.new_secret()).reveal()
    poor = desk.new_key("inference")
    async with desk.client() as client:
        for key in (forged, forged, forged, "nonsense", keys.generate("test").reveal()):
            await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        for _ in range(2):
            await client.get("/v1/tenants", headers={"authorization": f"Bearer {poor}"})
    assert desk.trail.acts == []
    await desk.rooms.refusals.once()
    told = [(act.action, act.code, act.actor.kind, act.actor.id, act.tenant, act.count) for act in desk.trail.acts]
    assert told == [
        ("authentication.refused", "invalid_api_key", "unknown", known.id, "default", 3),
        ("authentication.refused", "invalid_api_key", "unknown", None, None, 2),
        ("authorization.refused", "missing_scope", "key", keys.parse(poor).id, "default", 2),  # type: ignore[union-attr]
    ]
    assert {act.outcome for act in desk.trail.acts} == {"refused"}
    assert [(detail.name, detail.value) for detail in desk.trail.acts[2].details] == [("scope", "admin")]
    await desk.rooms.refusals.once()
    assert len(desk.trail.acts) == 3


async def test_a_flood_from_many_addresses_stays_small_and_loses_no_count(desk: Any) -> None:
    refusals = Refusals(desk.trail)
    for number in range(10 * REMEMBERED_REFUSALS):
        refusals.unauthenticated(Actor("unknown", client_address=f"2001:db8::{number:x}"), "invalid_api_key")
    desk.trail.away = RetryableError("gone")
    with pytest.raises(RetryableError):
        await refusals.once()
    desk.trail.away = None
    await refusals.once()
    assert len(desk.trail.acts) == REMEMBERED_REFUSALS + 1
    assert sum(act.count for act in desk.trail.acts) == 10 * REMEMBERED_REFUSALS
    assert desk.trail.acts[-1].client_address is None


async def test_what_was_counted_is_told_before_the_service_stops(desk: Any) -> None:
    stopping = asyncio.Event()
    working = asyncio.create_task(every(errors.RETRY_LATER, desk.rooms.refusals, "failed", last=True)(stopping))
    await asyncio.sleep(0)
    desk.rooms.refusals.unauthorized(Actor("key", "k", "default"), "admin")
    stopping.set()
    await working
    assert desk.trail.told == [("authorization.refused", "refused")]


def entry(tenant: str) -> AuditEntry:
    actor = AuditActor(kind="key", id="k", tenant=tenant)
    record = AuditRecorded(
        action="key.create", outcome="succeeded", actor=actor, tenant="default", client_address="192.0.2.1", occurred_at=NOW
    )
    return AuditEntry(id="e", record=record)


@pytest.mark.parametrize(
    ("scopes", "asked", "addresses"),
    [
        (("audit",), (False, None), [None, "192.0.2.1"]),
        (("audit", "admin"), (True, None), ["192.0.2.1", "192.0.2.1"]),
    ],
)
async def test_who_may_see_what(desk: Any, scopes: tuple[str, ...], asked: tuple[bool, None], addresses: list[str | None]) -> None:
    desk.log.answers = [AuditReported(entries=(entry("operators"), entry("default")), next_cursor="c")]
    async with desk.client(desk.new_key(*scopes)) as client:
        page = (await client.get("/v1/audit", params={"action": "key.create", "limit": 2, "since": "2026-11-20T00:00:00Z"})).json()
    ((question, _),) = desk.log.published
    assert isinstance(question, AuditInspected)
    assert (question.whole_platform, question.tenant) == asked
    assert (question.action, question.limit, question.since) == ("key.create", 2, NOW)
    assert [record["client_address"] for record in page["data"]] == addresses
    assert (page["has_more"], page["next_cursor"]) == (True, "c")


async def test_another_tenants_records_need_the_operator(desk: Any) -> None:
    desk.log.answers = [AuditReported(), AuditReported()]
    async with desk.client(desk.new_key("audit")) as client:
        own = await client.get("/v1/audit", params={"tenant_id": "default"})
        refused = await client.get("/v1/audit", params={"tenant_id": "other"})
    async with desk.client() as operator:
        others = await operator.get("/v1/audit", params={"tenant_id": "other"})
    assert (own.status_code, refused.status_code, others.status_code) == (200, 403, 200)
    assert [(question.whole_platform, question.tenant) for question, _ in desk.log.published] == [(False, "default"), (True, "other")]


@pytest.mark.parametrize("query", [{"limit": 101}, {"action": "key.steal"}, {"since": "yesterday"}])
async def test_a_question_that_means_nothing_is_refused(desk: Any, query: dict[str, Any]) -> None:
    async with desk.client() as client:
        answer = await client.get("/v1/audit", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query)))
