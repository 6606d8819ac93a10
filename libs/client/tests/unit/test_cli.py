"""The `tessera` command: what it prints, and its exit codes."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tessera.client import AnswerError, UnreachableError, cli

pytestmark = pytest.mark.unit

MEMORY = {
    "id": "m-1",
    "kind": "message",
    "text": "under the stone",
    "scores": {"total": 0.9, "vector": 0.5, "lexical": 0.3, "importance": 0.1, "recency": 0.0},
}
SPOOL = {
    "instance": "gateway-1",
    "spool": {"enabled": True, "records": 1, "bytes": 300, "oldest_accepted_at": "2026-11-21T07:00:00Z", "full": True},
    "data": [
        {
            "event_id": "m-1",
            "tenant_id": "acme",
            "type": "t",
            "accepted_at": "2026-11-21T07:00:00Z",
            "attempts": 2,
            "last_error": "Kafka is away.",
        }
    ],
}
NO_SPOOL = {"instance": "gateway-1", "spool": {"enabled": False}, "data": []}
STATUS = {
    "status": "degraded",
    "services": [
        {
            "service": "memory",
            "status": "degraded",
            "lag": 3,
            "replicas": [
                {
                    "instance": "m-1",
                    "status": "degraded",
                    "dependencies": [{"name": "embedder", "healthy": False, "breaker": "open"}],
                    "consumers": [{"name": "ingestion", "state": "running", "lag": 2}, {"name": "chat", "state": "running", "lag": 0}],
                },
                {
                    "instance": "m-2",
                    "status": "ready",
                    "dependencies": [],
                    "consumers": [{"name": "ingestion", "state": "paused", "lag": 1}],
                },
                {
                    "instance": "m-3",
                    "status": "lost",
                    "dependencies": [],
                    "consumers": [{"name": "ingestion", "state": "running", "lag": 9}],
                },
            ],
        }
    ],
}
_STUCK_EVENT = {"topic": "ingest", "partition": 3, "offset": 1742, "code": "busy", "attempts": 15, "since": "2026-01-01T00:00:00Z"}
_HALTED = {"name": "ingestion", "state": "paused", "lag": 2, "halted": "20 events in a row", "stuck": [_STUCK_EVENT]}
STUCK = {
    "status": "degraded",
    "services": [
        {
            "service": "memory",
            "status": "degraded",
            "lag": 3,
            "replicas": [{"instance": "m-1", "status": "degraded", "dependencies": [], "consumers": [_HALTED]}],
        }
    ],
}

LETTER = {
    "id": "ingest.memory.dlq:0:1",
    "refused_at": "2026-01-01T00:00:00Z",
    "status": "pending",
    "code": "c",
    "message": "why",
    "field": "f",
    "tenant_id": "acme",
    "event_id": "e-1",
    "topic": "ingest",
    "partition": 0,
    "offset": 3,
    "service": "memory",
    "attempts": 1,
    "replays": 0,
    "trace_id": None,
    "request_id": None,
    "size_bytes": 2,
    "key": None,
    "headers": [{"name": "odd", "text": None, "base64": "/w=="}],
    "value": {"text": "{}", "base64": "e30="},
}
SETTLED = {"id": "l", "result": "replayed", "error": None}
AUDITED = {
    "id": "a-1",
    "occurred_at": "2026-01-01T00:00:00Z",
    "action": "key.create",
    "outcome": "succeeded",
    "actor": {"kind": "key", "id": "k-1", "tenant_id": "default"},
    "tenant_id": "acme",
    "target": {"kind": "key", "id": "k-2"},
    "code": None,
    "details": {"scopes": "inference audit"},
    "count": 1,
    "client_address": "192.0.2.1",
    "request_id": "req-1",
}
REFUSED = {
    **AUDITED,
    "action": "authentication.refused",
    "outcome": "refused",
    "actor": {"kind": "unknown", "id": None, "tenant_id": None},
    "tenant_id": None,
    "target": None,
    "code": "invalid_api_key",
    "details": {},
    "count": 412,
}
NO_AUDIT_FILTER = dict.fromkeys(("actor", "action", "target", "tenant_id", "since", "until"))
NO_CHOICE = dict.fromkeys(("topic", "service", "code", "since", "until", "event_id", "tenant_id"))


class Gateway:
    """Plays the SDK: answers by the name of the method."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def invoke(gateway: Gateway, *arguments: str, text: str | None = None) -> Result:
        monkeypatch.setattr(cli.Context, "client", lambda _: gateway)
        return CliRunner().invoke(cli.main, list(arguments), input=text)

    return invoke


@pytest.mark.parametrize(
    ("arguments", "answers", "call", "printed"),
    [
        (
            ["tenant", "create", "acme"],
            {"create_tenant": {"id": "acme", "status": "active"}},
            ("create_tenant", ("acme", None), {}),
            "acme: active",
        ),
        (["tenant", "list"], {"tenants": [{"id": "a", "status": "active", "name": "A"}]}, ("tenants", (), {}), "active     A"),
        (
            ["key", "create", "--tenant", "acme", "--name", "n", "--scope", "inference", "--requests-per-minute", "60"],
            {"create_key": {"key": "tsr_x", "id": "i"}},
            (
                "create_key",
                ("acme",),
                {
                    "name": "n",
                    "scopes": ("inference",),
                    "expires_at": None,
                    "limits": {"requests_per_minute": 60, "tokens_per_minute": None, "concurrent_streams": None, "spend_per_day": None},
                },
            ),
            "tsr_x",
        ),
        (
            ["key", "list"],
            {"keys": [{"id": "i", "status": "active", "name": "n", "scopes": ["s"]}]},
            ("keys", (None,), {}),
            "i active   n [s]",
        ),
        (
            ["key", "rotate", "i", "--grace-seconds", "60"],
            {"rotate_key": {"key": "tsr_y", "id": "i"}},
            ("rotate_key", ("i",), {"grace_seconds": 60}),
            "tsr_y",
        ),
        (["key", "revoke", "i"], {"revoke_key": None}, ("revoke_key", ("i",), {}), "i: revoked"),
        (
            ["search", "stone", "--kind", "message", "--limit", "2"],
            {"search": {"data": [MEMORY]}},
            ("search", ("stone",), {"limit": 2, "kinds": ["message"]}),
            "vector 0.500, lexical 0.300",
        ),
        (["search", "stone"], {"search": {"data": []}}, ("search", ("stone",), {"limit": 5}), "nothing found"),
        (
            ["parked", "retry", "memory", "ingest.acme:3:1742"],
            {"decide_parked": {"status": "accepted"}},
            ("decide_parked", ("memory", "ingest.acme", 3, 1742, "retry"), {}),
            "ingest.acme:3:1742: retry is on its way to memory",
        ),
        (["status"], {"status": STUCK}, ("status", (), {}), "ingestion is stuck at ingest:3:1742: busy, 15 attempts since 2026-01-01"),
        (["status"], {"status": STUCK}, ("status", (), {}), "ingestion is halted: 20 events in a row"),
        (["status"], {"status": STATUS}, ("status", (), {}), "m-1: degraded; down: embedder; breakers: embedder open"),
        (["lag"], {"status": STATUS}, ("status", (), {}), "memory     ingestion         3  paused running"),
        (
            ["dead-letter", "list", "--code", "c", "--limit", "2"],
            {"dead_letters": [LETTER]},
            ("dead_letters", (), {"limit": 2, "order": "newest", "status": "pending", **NO_CHOICE, "code": "c"}),
            "ingest.memory.dlq:0:1  2026-01-01T00:00:00Z  pending  c  acme  e-1",
        ),
        (["dead-letter", "show", "l"], {"dead_letter": LETTER}, ("dead_letter", ("l",), {}), "header    odd: base64 /w=="),
        (
            ["dead-letter", "replay", "l"],
            {"replay_dead_letters": [SETTLED]},
            ("replay_dead_letters", (), {"ids": ("l",), "dry_run": False, **NO_CHOICE}),
            "l: replayed",
        ),
        (
            ["dead-letter", "discard", "--tenant", "acme", "--dry-run"],
            {"discard_dead_letters": [SETTLED]},
            ("discard_dead_letters", (), {"ids": None, "dry_run": True, **NO_CHOICE, "tenant_id": "acme"}),
            "l: replayed",
        ),
        (
            ["dead-letter", "replay", "--all"],
            {"replay_dead_letters": []},
            ("replay_dead_letters", (), {"ids": None, "dry_run": False, **NO_CHOICE}),
            "no dead letters",
        ),
        (
            ["audit", "list", "--action", "key.create", "--tenant", "acme", "--limit", "2"],
            {"audit_events": [AUDITED]},
            ("audit_events", (), {"limit": 2, **NO_AUDIT_FILTER, "action": "key.create", "tenant_id": "acme"}),
            "2026-01-01T00:00:00Z  key.create  succeeded  by key k-1  from 192.0.2.1  on key k-2  of acme  scopes=inference audit",
        ),
        (
            ["audit", "list"],
            {"audit_events": [REFUSED]},
            ("audit_events", (), {"limit": 50, **NO_AUDIT_FILTER}),
            "authentication.refused  refused (invalid_api_key)  by unknown  from 192.0.2.1  412 times",
        ),
        (["audit", "list"], {"audit_events": []}, ("audit_events", (), {"limit": 50, **NO_AUDIT_FILTER}), "nothing on record"),
        (["spool", "list"], {"spool": SPOOL}, ("spool", (), {}), "m-1 t, 2 attempts: Kafka is away."),
        (["spool", "list"], {"spool": SPOOL}, ("spool", (), {}), "1 events, 300 bytes, oldest 2026-11-21T07:00:00Z; full"),
        (["spool", "list"], {"spool": NO_SPOOL}, ("spool", (), {}), "no spool"),
        (
            ["spool", "replay", "--id", "m-1", "--id", "m-2"],
            {"replay_spool": [{"event_id": "m-1", "status": "published"}]},
            ("replay_spool", (("m-1", "m-2"),), {}),
            "m-1: published",
        ),
        (
            ["models"],
            {"models": [{"id": "m", "tessera": {"capability": "chat", "description": "d"}}]},
            ("models", (), {}),
            "chat       d",
        ),
    ],
)
def test_commands(run: Any, arguments: list[str], answers: dict[str, Any], call: Any, printed: str) -> None:
    gateway = Gateway(**answers)
    told = run(gateway, *arguments)
    assert (told.exit_code, gateway.calls) == (0, [call])
    assert printed in told.output
    json.loads(run(Gateway(**answers), "--json", *arguments).output)


def test_a_replay_that_did_not_arrive_is_a_failure(run: Any) -> None:
    told = run(Gateway(replay_spool=[{"event_id": "m-1", "status": "waiting"}]), "spool", "replay", "--id", "m-1")
    assert (told.exit_code, told.output) == (cli.EXIT_REFUSED, "m-1: waiting\n")


def test_a_key_may_expire(run: Any) -> None:
    gateway = Gateway(create_key={"key": "k"})
    run(gateway, "key", "create", "--days", "1")
    assert gateway.calls[0][2]["expires_at"].endswith("+00:00")


def test_a_text_is_ingested_and_waited_for(run: Any) -> None:
    gateway = Gateway(ingest={"event_id": "e", "status": "accepted"}, wait_until_searchable={"status": "searchable", "reason": None})
    told = run(gateway, "ingest", "hello", "--conversation", "c", "--wait")
    assert (told.exit_code, told.output) == (0, "searchable e\n")
    assert gateway.calls[0][1] == ({"type": "message", "conversation_id": "c", "role": "user", "content": "hello"},)


def test_a_file_is_ingested_and_what_was_refused_is_named(run: Any) -> None:
    problem = {"code": "unknown_parameter", "message": "Unknown parameter."}
    data = [{"index": 0, "status": "accepted", "event_id": "e"}, {"index": 1, "status": "refused", "event_id": None, "error": problem}]
    told = run(Gateway(ingest_batch={"data": data}), "ingest", "--file", "-", text='{"type": "entity"}\n\n{"type": "x"}\n')
    assert told.exit_code == cli.EXIT_REFUSED
    assert told.output == "item 0: accepted e\nitem 1: refused unknown_parameter: Unknown parameter.\n"


@pytest.mark.parametrize(
    ("arguments", "text", "complaint"),
    [
        (["ingest"], None, "TEXT or --file"),
        (["ingest", "x", "--file", "-"], "", "TEXT or --file"),
        (["ingest", "--file", "-"], "{", "line 1 is not JSON"),
        (["parked", "retry", "memory", "ingest:x:1"], None, "TOPIC:PARTITION:OFFSET"),
    ],
)
def test_wrong_usage(run: Any, arguments: list[str], text: str | None, complaint: str) -> None:
    told = run(Gateway(), *arguments, text=text)
    assert told.exit_code == 2
    assert complaint in told.output


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (AnswerError(403, "missing_scope", "No."), cli.EXIT_REFUSED, "missing_scope"),
        (UnreachableError("Gone."), cli.EXIT_UNREACHABLE, "unreachable"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(run: Any, error: Exception, exit_code: int, code: str) -> None:
    plain, as_json = run(Gateway(status=error), "status"), run(Gateway(status=error), "--json", "status")
    assert plain.exit_code == as_json.exit_code == exit_code
    assert plain.output.startswith("tessera: ")
    assert json.loads(as_json.output)["error"]["code"] == code


def test_a_missing_setting_is_named() -> None:
    told = CliRunner(env={"TESSERA_URL": "", "TESSERA_API_KEY": ""}).invoke(cli.main, ["status"])
    assert told.exit_code == 2
    assert "TESSERA_URL and TESSERA_API_KEY not set" in told.output


def test_where_to_see_a_trace() -> None:
    assert "make trace ID=req_1" in CliRunner().invoke(cli.main, ["trace", "req_1"]).output


@pytest.mark.parametrize("chosen", [[], ["l", "--all"], ["l", "--code", "c"], ["--code", "c", "--all"]], ids=" ".join)
@pytest.mark.parametrize("action", ["replay", "discard"])
def test_letters_are_chosen_in_one_way(run: Any, action: str, chosen: list[str]) -> None:
    told = run(Gateway(), "dead-letter", action, *chosen)
    assert told.exit_code == 2
    assert "Give LETTER_IDS" in told.output


@pytest.mark.parametrize(
    ("result", "error"), [("failed", {"code": "topic_missing", "message": "gone"}), ("not_found", None)], ids=["failed", "not found"]
)
def test_a_letter_that_was_not_replayed_is_an_exit_code(run: Any, result: str, error: Any) -> None:
    settled = [{"id": "l", "result": result, "error": error}]
    assert run(Gateway(replay_dead_letters=settled), "dead-letter", "replay", "l").exit_code == 1
