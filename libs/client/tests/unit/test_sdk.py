"""The SDK against a real HTTP server that says what each test scripts."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tessera.client import AnswerError, Tessera, UnreachableError, read_your_writes

pytestmark = pytest.mark.unit


@dataclass
class Script:
    """Answers in turn, and what was asked."""

    url: str = ""
    answers: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    asked: list[tuple[str, str, Any, dict[str, str]]] = field(default_factory=list)

    def then(self, status: int, body: Any, **headers: str) -> "Script":
        self.answers.append((status, body, headers))
        return self


def handler_of(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            script.asked.append((self.command, self.path, json.loads(body) if body else None, headers))
            status, answer, extra = script.answers.pop(0)
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**extra, "content-length": str(len(data))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            return

    return Handler


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(made))
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def client(script: Script, pauses: list[float] | None = None, attempts: int = 3) -> Tessera:
    return Tessera(script.url, "key", attempts=attempts, sleep=(pauses if pauses is not None else []).append)


ERROR = {"error": {"message": "No.", "type": "invalid_request_error", "param": "id", "code": "tenant_exists"}}


def test_a_request_carries_the_key_and_an_idempotency_key(script: Script) -> None:
    script.then(202, {"event_id": "e"}).then(202, {"event_id": "e"})
    with client(script) as tessera:
        assert tessera.ingest({"type": "message"})["event_id"] == "e"
        tessera.ingest({"type": "message"}, idempotency_key="mine")
    (_, path, body, headers), (_, _, _, second) = script.asked
    assert (path, body, headers["authorization"]) == ("/v1/memories", {"type": "message"}, "Bearer key")
    assert headers["idempotency-key"]
    assert second["idempotency-key"] == "mine"


def test_a_busy_server_is_asked_again_with_the_same_key_after_its_pause(script: Script) -> None:
    script.then(503, ERROR, retry_after="2").then(429, ERROR).then(202, {"data": []})
    pauses: list[float] = []
    with client(script, pauses) as tessera:
        tessera.ingest_batch([{"type": "entity"}])
    assert len({headers["idempotency-key"] for *_, headers in script.asked}) == 1
    assert pauses == [2.0, 0.4]


def test_a_refusal_tells_code_param_and_request(script: Script) -> None:
    script.then(409, ERROR, x_request_id="req_1")
    with client(script) as tessera, pytest.raises(AnswerError) as refused:
        tessera.create_tenant("acme", "Acme")
    error = refused.value
    assert (error.status, error.code, error.param, error.request_id) == (409, "tenant_exists", "id", "req_1")
    assert str(error) == "409 tenant_exists (id): No. [request req_1]"


def test_something_that_is_not_tessera_is_told(script: Script) -> None:
    script.then(502, b"<html>Bad gateway</html>")
    with client(script) as tessera, pytest.raises(AnswerError, match="no answer of Tessera: <html>"):
        tessera.status()


def test_a_lost_answer_is_asked_for_again_but_a_key_is_not_made_twice(script: Script) -> None:
    script.then(0, None).then(200, {"data": [{"id": "m"}]}).then(0, None)
    with client(script) as tessera:
        assert tessera.models() == [{"id": "m"}]
        with pytest.raises(UnreachableError):
            tessera.create_key("acme", name="n", scopes=["inference"])
    assert [path for _, path, *_ in script.asked] == ["/v1/models", "/v1/models", "/v1/keys"]


def test_nobody_there() -> None:
    pauses: list[float] = []
    with Tessera("http://127.0.0.1:9", "key", sleep=pauses.append) as tessera, pytest.raises(UnreachableError, match="does not answer"):
        tessera.status()
    assert len(pauses) == 2


def test_pages_are_followed(script: Script) -> None:
    script.then(200, {"data": [{"id": "a"}], "next_cursor": "a"}).then(200, {"data": [{"id": "b"}], "next_cursor": None})
    script.then(200, {"data": [], "next_cursor": None})
    with client(script) as tessera:
        assert [tenant["id"] for tenant in tessera.tenants()] == ["a", "b"]
        assert tessera.keys("acme") == []
    assert [path for _, path, *_ in script.asked] == [
        "/v1/tenants?limit=200",
        "/v1/tenants?limit=200&after=a",
        "/v1/keys?tenant_id=acme&limit=200",
    ]


def test_the_spool_is_read_to_its_end_and_replayed_by_id(script: Script) -> None:
    script.then(200, {"data": [{"event_id": "a"}], "spool": {"records": 2}, "has_more": True, "next_cursor": "a"})
    script.then(200, {"data": [{"event_id": "b"}], "spool": {"records": 2}, "has_more": False, "next_cursor": None})
    script.then(200, {"data": [{"event_id": "a", "status": "published"}]})
    with client(script) as tessera:
        assert [entry["event_id"] for entry in tessera.spool()["data"]] == ["a", "b"]
        assert tessera.replay_spool(["a"]) == [{"event_id": "a", "status": "published"}]
    assert [asked[1] for asked in script.asked] == ["/v1/spool?limit=200", "/v1/spool?limit=200&after=a", "/v1/spool/replay"]
    assert script.asked[2][2] == {"event_ids": ["a"]}


def test_search_filters_travel_and_a_revoked_key_answers_nothing(script: Script) -> None:
    script.then(200, {"data": []}).then(204, b"")
    with client(script) as tessera:
        tessera.search("q", limit=3, kinds=["message"])
        tessera.revoke_key("k")
    assert script.asked[0][2] == {"query": "q", "limit": 3, "filter": {"kinds": ["message"]}}
    assert script.asked[1][:2] == ("DELETE", "/v1/keys/k")


def test_a_search_waits_for_what_was_written_and_not_longer_than_asked(script: Script) -> None:
    script.then(202, {"consistency": {"token": "t-1"}}).then(202, {"data": [], "consistency": {"token": "t-2"}})
    script.then(503, {"error": {"message": "m", "type": "server_error", "param": None, "code": "not_up_to_bound"}})
    with client(script) as tessera:
        written = [tessera.ingest({"type": "message"}), tessera.ingest_batch([{"type": "message"}])]
        with pytest.raises(AnswerError, match="not_up_to_bound"):
            tessera.search("q", consistency=read_your_writes(*written, wait=timedelta(seconds=2), until="vectors"))
    wanted = {"level": "read_your_writes", "token": ["t-1", "t-2"], "until": "vectors", "wait_seconds": 2.0}
    assert script.asked[2][2] == {"query": "q", "limit": 10, "filter": {}, "consistency": wanted}
    assert len(script.asked) == 3


def test_waiting_ends_with_the_state_or_with_patience(script: Script) -> None:
    script.then(200, {"status": "applied"}).then(200, {"status": "searchable"}).then(200, {"status": "unknown"})
    with client(script) as tessera:
        assert tessera.wait_until_searchable("e")["status"] == "searchable"
        with pytest.raises(UnreachableError, match="still unknown"):
            tessera.wait_until_searchable("e", patience=timedelta(seconds=-1))


def test_no_attempt_at_all_is_a_mistake() -> None:
    with Tessera("http://127.0.0.1:9", "key", attempts=0) as tessera, pytest.raises(ValueError, match="attempts"):
        tessera.status()


def test_dead_letters_are_paged_up_to_the_limit(script: Script) -> None:
    script.then(200, {"data": [{"id": "a"}], "next_cursor": "c"}).then(200, {"data": [], "next_cursor": "d"})
    script.then(200, {"data": [{"id": "b"}, {"id": "c"}], "next_cursor": "e"})
    with client(script) as tessera:
        assert [letter["id"] for letter in tessera.dead_letters(limit=2, code="x", topic=None)] == ["a", "b"]
    assert [path for _, path, _, _ in script.asked] == [
        "/v1/dead-letters?code=x&limit=200",
        "/v1/dead-letters?code=x&limit=200&after=c",
        "/v1/dead-letters?code=x&limit=200&after=d",
    ]


def test_audit_events_are_paged_up_to_the_limit(script: Script) -> None:
    script.then(200, {"data": [{"id": "a"}], "next_cursor": "c"}).then(200, {"data": [{"id": "b"}, {"id": "c"}], "next_cursor": "d"})
    with client(script) as tessera:
        assert [event["id"] for event in tessera.audit_events(limit=2, action="key.create", actor=None)] == ["a", "b"]
    assert [path for _, path, _, _ in script.asked] == [
        "/v1/audit?action=key.create&limit=100",
        "/v1/audit?action=key.create&limit=100&after=c",
    ]


def test_a_decision_about_a_stuck_event(script: Script) -> None:
    with client(script.then(202, {"status": "accepted"})) as tessera:
        tessera.decide_parked("memory", "ingest", 3, 1742, "discard")
    assert script.asked[0][:2] == ("POST", "/v1/services/memory/control")


def test_one_dead_letter(script: Script) -> None:
    with client(script.then(200, {"id": "ingest.memory.dlq:0:1"})) as tessera:
        assert tessera.dead_letter("ingest.memory.dlq:0:1") == {"id": "ingest.memory.dlq:0:1"}
    assert script.asked[0][1] == "/v1/dead-letters/ingest.memory.dlq:0:1"


def test_a_replay_by_filter_goes_on_to_the_end(script: Script) -> None:
    script.then(200, {"data": [{"id": "a"}], "next_cursor": "c"}).then(200, {"data": [{"id": "b"}], "next_cursor": None})
    with client(script) as tessera:
        assert [one["id"] for one in tessera.replay_dead_letters(code="x", service=None)] == ["a", "b"]
    bodies = [body for _, path, body, _ in script.asked if path == "/v1/dead-letters/replay"]
    assert bodies == [{"filter": {"code": "x"}, "dry_run": False}, {"filter": {"code": "x"}, "dry_run": False, "after": "c"}]


def test_many_ids_are_discarded_in_portions(script: Script) -> None:
    script.then(200, {"data": [{"id": "a"}]}).then(200, {"data": [{"id": "b"}]})
    with client(script) as tessera:
        assert [one["id"] for one in tessera.discard_dead_letters(ids=[str(number) for number in range(101)], dry_run=True)] == ["a", "b"]
    assert [(path, len(body["ids"]), body["dry_run"]) for _, path, body, _ in script.asked] == [
        ("/v1/dead-letters/discard", 100, True),
        ("/v1/dead-letters/discard", 1, True),
    ]
