"""curl, as it is, over the whole platform: each operation, streamed and whole, well and ill, with status, headers and body."""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pytest
from upstream import CHAT, COMPLETION, Upstream, completed, ended, said, usage

from tessera.testkit.issuer import LocalIssuer
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120), pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")]

EMBEDDING = "all-MiniLM-L6-v2"
HTTP_ERROR: Final = 22
"""How curl ends with --fail-with-body."""

BODIES: Final[Mapping[str, tuple[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}]}),
    "completion": ("/v1/completions", {"model": COMPLETION, "prompt": "Hello"}),
    "embeddings": ("/v1/embeddings", {"model": EMBEDDING, "input": ["Hello", "world"]}),
    "models": ("/v1/models", None),
}
GENERATIONS: Final = ("chat", "completion")
OPERATIONS: Final = [*((name, False) for name in BODIES), *((name, True) for name in GENERATIONS)]
"""With whether the answer is streamed."""


@dataclass(frozen=True)
class Answer:
    """What curl was told."""

    status: int
    headers: Mapping[str, str]
    body: str
    exit_code: int

    @property
    def events(self) -> list[str]:
        """The data of each server-sent event."""
        return [line.removeprefix("data: ") for line in self.body.splitlines() if line.startswith("data: ")]

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whole."""
        body = json.loads(self.body)
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        found: dict[str, Any] = body["error"]
        return found


@dataclass(frozen=True)
class Curl:
    """The program, with a key."""

    url: str
    key: str

    def __call__(
        self, path: str, *options: str, body: bytes | None = None, key: str | None = None, kind: str = "application/json"
    ) -> Answer:
        presented = self.key if key is None else key
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--include", "--fail-with-body", "--max-time", "60", self.url + path]
        command += ["--header", f"Authorization: Bearer {presented}"] if presented else []
        command += ["--header", f"Content-Type: {kind}", "--data-binary", "@-"] if body is not None else []
        done = subprocess.run([*command, *options], input=body, capture_output=True, check=False, timeout=90)
        assert done.returncode in (0, HTTP_ERROR), done.stderr.decode()
        return _parsed(done.stdout.decode(), done.returncode)

    def ask(self, operation: str, *options: str, stream: bool = False, key: str | None = None, **changes: Any) -> Answer:
        """The operation's request with other fields; one that is None is left out."""
        path, body = BODIES[operation]
        if body is None:
            return self(path, *options, key=key)
        said = {**body, **({"stream": True} if stream else {}), **changes}
        sent = {name: value for name, value in said.items() if value is not None}
        return self(path, *options, body=json.dumps(sent).encode(), key=key)


def _parsed(received: str, exit_code: int) -> Answer:
    """Whatever an interim answer says comes before the one that counts."""
    head, _, body = received.partition("\r\n\r\n")
    while head.split(" ")[1].startswith("1"):
        head, _, body = body.partition("\r\n\r\n")
    line, *fields = head.split("\r\n")
    named = (field.partition(":") for field in fields)
    return Answer(int(line.split(" ")[1]), {name.lower(): value.strip() for name, _, value in named}, body, exit_code)


@pytest.fixture(scope="module")
def curl(platform: Platform) -> Curl:
    return Curl(platform.url, platform.admin_key)


@pytest.fixture(scope="module")
def narrow_key(platform: Platform) -> str:
    """A key that may do something else."""
    return str(platform.request("POST", "/v1/keys", json={"name": "narrow", "scopes": ["retention"]}).json()["key"])


@pytest.fixture
def provider(upstream: Upstream) -> Callable[[str], None]:
    """Answers an operation."""

    def answers(operation: str) -> None:
        if operation == "chat":
            upstream.says(said("Hi "), said("there"), ended(), usage(7, 4))
        elif operation == "completion":
            upstream.says(completed("Hi "), completed("there", "stop"), usage(7, 4))

    return answers


# --- well -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "stream"), OPERATIONS)
def test_an_answer(curl: Curl, provider: Callable[[str], None], operation: str, stream: bool) -> None:
    provider(operation)
    answer = curl.ask(operation, stream=stream, stream_options={"include_usage": True} if stream else None)
    assert (answer.status, answer.exit_code) == (200, 0), answer.body
    _assert_headers(answer)
    if stream:
        _assert_stream(answer, operation)
    else:
        assert answer.headers["content-type"] == "application/json"
        _WHOLE[operation](json.loads(answer.body))


def _assert_headers(answer: Answer) -> None:
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert answer.headers["cache-control"].startswith("no-")


def _assert_stream(answer: Answer, operation: str) -> None:
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    *chunks, last = answer.events
    assert last == "[DONE]"
    told = [json.loads(chunk) for chunk in chunks]
    parts = [choice for chunk in told for choice in chunk["choices"]]
    texts = [part["delta"].get("content") or "" if operation == "chat" else part["text"] for part in parts]
    assert ("".join(texts), parts[-1]["finish_reason"]) == ("Hi there", "stop")
    assert {chunk["object"] for chunk in told} == {"chat.completion.chunk" if operation == "chat" else "text_completion"}
    assert (told[-1]["choices"], told[-1]["usage"]["total_tokens"]) == ([], 11)


def _whole_chat(body: dict[str, Any]) -> None:
    (choice,) = body["choices"]
    assert (body["object"], choice["message"]["content"], choice["finish_reason"]) == ("chat.completion", "Hi there", "stop")
    assert body["usage"]["total_tokens"] == 11


def _whole_completion(body: dict[str, Any]) -> None:
    (choice,) = body["choices"]
    assert (body["object"], choice["text"], choice["finish_reason"]) == ("text_completion", "Hi there", "stop")
    assert body["usage"]["total_tokens"] == 11


def _whole_embeddings(body: dict[str, Any]) -> None:
    assert [(item["object"], item["index"], len(item["embedding"])) for item in body["data"]] == [
        ("embedding", 0, 384),
        ("embedding", 1, 384),
    ]
    assert (body["object"], body["usage"]["prompt_tokens"] > 0) == ("list", True)


def _whole_models(body: dict[str, Any]) -> None:
    assert body["object"] == "list"
    assert {CHAT, COMPLETION, "local/quote"} <= {model["id"] for model in body["data"]}
    assert {model["object"] for model in body["data"]} == {"model"}


_WHOLE: Final[Mapping[str, Callable[[dict[str, Any]], None]]] = {
    "chat": _whole_chat,
    "completion": _whole_completion,
    "embeddings": _whole_embeddings,
    "models": _whole_models,
}


@pytest.mark.parametrize(
    "options",
    [
        ("--compressed",),
        ("--http1.0",),
        ("--header", "Expect: 100-continue"),
        ("--header", "Transfer-Encoding: chunked"),
        ("--http2",),
        ("--user-agent", ""),
        ("--header", "Accept:"),
    ],
    ids=" ".join,
)
def test_however_curl_speaks(curl: Curl, provider: Callable[[str], None], options: tuple[str, ...]) -> None:
    provider("chat")
    for stream in (False, True):
        answer = curl.ask("chat", *options, stream=stream)
        assert (answer.status, answer.exit_code) == (200, 0), answer.body


@pytest.mark.parametrize(("operation", "stream"), OPERATIONS)
def test_an_access_token_in_place_of_a_key(
    curl: Curl, provider: Callable[[str], None], issuer: LocalIssuer, operation: str, stream: bool
) -> None:
    provider(operation)
    assert curl.ask(operation, stream=stream, key=issuer.token(scope="inference")).status == 200
    refused = curl.ask(operation, stream=stream, key=issuer.token(scope="memory:read"))
    assert (refused.status, refused.error["code"]) == (403, "missing_scope")
    expired = curl.ask(operation, stream=stream, key=issuer.token(scope="inference", exp=1))
    assert (expired.status, expired.error["code"]) == (401, "token_expired")
    assert expired.headers["www-authenticate"] == 'Bearer error="invalid_token"'


# --- ill --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """What is asked, and what the answer is."""

    status: int
    code: str
    param: str | None
    asked: Callable[[Curl, str, bool], Answer]
    of: tuple[str, ...] = tuple(BODIES)
    streamed: bool = True
    """Whether it is tried with `stream`, too."""


def _sent(body: bytes, **more: Any) -> Callable[[Curl, str, bool], Answer]:
    return lambda curl, operation, _: curl(BODIES[operation][0], body=body, **more)


def _without(field: str) -> Callable[[Curl, str, bool], Answer]:
    return lambda curl, operation, stream: curl.ask(operation, stream=stream, **{field: None})


def _changed(**changes: Any) -> Callable[[Curl, str, bool], Answer]:
    return lambda curl, operation, stream: curl.ask(operation, stream=stream, **changes)


WITH_BODY: Final = ("chat", "completion", "embeddings")
REFUSALS: Final[Mapping[str, Refusal]] = {
    "no key": Refusal(401, "missing_api_key", None, lambda curl, operation, stream: curl.ask(operation, stream=stream, key="")),
    "a wrong key": Refusal(
        401, "invalid_api_key", None, lambda curl, operation, stream: curl.ask(operation, stream=stream, key="sk-wrong")
    ),
    "an odd key": Refusal(
        401, "invalid_api_key", None, lambda curl, operation, stream: curl.ask(operation, stream=stream, key="tsr_ ä b\t😀")
    ),
    "another method": Refusal(
        405, "method_not_allowed", None, lambda curl, operation, stream: curl.ask(operation, "--request", "PATCH", stream=stream)
    ),
    "an unknown path": Refusal(404, "unknown_url", None, lambda curl, *_: curl("/v1/nothing"), ("models",)),
    "an unknown model": Refusal(404, "model_not_found", None, _changed(model="no/such"), WITH_BODY),
    "no such model": Refusal(404, "model_not_found", None, lambda curl, *_: curl("/v1/models/no/such"), ("models",)),
    "no model": Refusal(400, "missing_required_parameter", "model", _without("model"), WITH_BODY),
    "no messages": Refusal(400, "missing_required_parameter", "messages", _without("messages"), ("chat",)),
    "no prompt": Refusal(400, "missing_required_parameter", "prompt", _without("prompt"), ("completion",)),
    "no input": Refusal(400, "missing_required_parameter", "input", _without("input"), ("embeddings",)),
    "a wrong type": Refusal(400, "invalid_type", "temperature", _changed(temperature="hot"), GENERATIONS),
    "an unknown field": Refusal(400, "unknown_parameter", "nonsense", _changed(nonsense=1), WITH_BODY),
    "no JSON": Refusal(400, "invalid_json", None, _sent(b"{"), WITH_BODY, streamed=False),
    "an empty body": Refusal(400, "missing_required_parameter", None, _sent(b""), WITH_BODY, streamed=False),
    "no UTF-8": Refusal(400, "invalid_json", None, _sent(b'{"model": "\xff"}'), WITH_BODY, streamed=False),
    "another media type": Refusal(
        415, "unsupported_media_type", None, _sent(b"a=b", kind="application/x-www-form-urlencoded"), WITH_BODY, streamed=False
    ),
    "too large a body": Refusal(413, "request_too_large", None, _sent(b"x" * (1024 * 1024 + 1)), WITH_BODY, streamed=False),
}


@pytest.mark.parametrize(
    ("name", "operation", "stream"),
    [
        (name, operation, stream)
        for name, refusal in REFUSALS.items()
        for operation, stream in OPERATIONS
        if operation in refusal.of and (refusal.streamed or not stream)
    ],
)
def test_a_refusal(curl: Curl, name: str, operation: str, stream: bool) -> None:
    refusal = REFUSALS[name]
    answer = refusal.asked(curl, operation, stream)
    assert (answer.status, answer.exit_code) == (refusal.status, HTTP_ERROR), answer.body
    assert answer.headers["content-type"] == "application/json"
    assert {part: answer.error[part] for part in ("code", "param", "type")} == {
        "code": refusal.code,
        "param": refusal.param,
        "type": "invalid_request_error",
    }
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers.get("www-authenticate", "").startswith("Bearer") == (refusal.status == 401)
    assert ("allow" in answer.headers) == (refusal.status == 405)


@pytest.mark.parametrize(("operation", "stream"), OPERATIONS)
def test_a_key_that_may_do_something_else(curl: Curl, narrow_key: str, operation: str, stream: bool) -> None:
    answer = curl.ask(operation, stream=stream, key=narrow_key)
    assert (answer.status, answer.error["code"]) == (403, "missing_scope")


@pytest.mark.parametrize("operation", GENERATIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_that_is_busy(curl: Curl, upstream: Upstream, operation: str, stream: bool) -> None:
    upstream.refuses(429, {"message": "Slow down.", "code": "rate_limit_exceeded"}, retry_after="30")
    answer = curl.ask(operation, stream=stream)
    if stream:  # it has begun: the error is its last event
        assert (answer.status, answer.exit_code) == (200, 0)
        told = json.loads(answer.events[-1])["error"]
    else:
        assert (answer.status, answer.exit_code, int(answer.headers["retry-after"]) > 0) == (429, HTTP_ERROR, True)
        told = answer.error
    assert (told["code"], told["type"]) == ("provider_rate_limited", "rate_limit_error")
