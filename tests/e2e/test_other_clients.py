"""Clients that know nothing of Tessera, unmodified and each in an environment of its own: only the base URL is ours.

They are installed from the locks beside them, once for each cache of downloads. Where their registry cannot be reached the test says so.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from upstream import CHAT, COMPLETION, KNOWN, Upstream, called, completed, ended, said, usage

from tessera.local.setup import uv_program
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CLIENTS = Path(__file__).parent / "clients"
EMBEDDING = "all-MiniLM-L6-v2"
RANKS = "https://openaipublic.blob.core.windows.net/encodings/{name}"
ANSWER = {"content": "Hi there", "finish_reason": "stop", "total_tokens": 11}
UNKNOWN = {"raised": "NotFoundError", "status": 404, "code": "model_not_found", "param": None, "type": "invalid_request_error"}
EMPTY = {"raised": "BadRequestError", "status": 400, "code": "empty_array", "param": "messages", "type": "invalid_request_error"}
STRANGER = {"raised": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None, "type": "invalid_request_error"}
ERRORS = {"unknown_model": UNKNOWN, "unknown_model_stream": UNKNOWN, "no_messages": EMPTY, "wrong_key": STRANGER}
BUSY = {"raised": "BadRequestError", "status": 400, "code": "context_length_exceeded", "param": "messages", "type": "invalid_request_error"}


def chats(upstream: Upstream) -> None:
    upstream.says(said("Hi "), said("there"), ended(), usage(7, 4))


def completes(upstream: Upstream) -> None:
    upstream.says(completed("Hi "), completed("there", "stop"), usage(7, 4))


def refuses(upstream: Upstream) -> None:
    upstream.refuses(400, {"message": "Too long.", "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"})


def test_node(platform: Platform, upstream: Upstream, node: list[str]) -> None:
    models = (CHAT, COMPLETION)
    chats(upstream)
    told = run(platform, node, models, "models", "model", "chat", "chat_stream", "stored", "embeddings", *ERRORS)
    assert {CHAT, COMPLETION, "local/quote"} <= set(told.pop("models"))
    stored = {"listed": True, "kept": "Hi there", "asked": ["Hello"], "relabelled": "nobody", "deleted": True}
    assert told == {"model": CHAT, "chat": ANSWER, "chat_stream": ANSWER, "stored": stored, "embeddings": [384, 384], **ERRORS}
    completes(upstream)
    assert run(platform, node, models, "text", "text_stream") == {"text": ANSWER, "text_stream": ANSWER}
    refuses(upstream)
    assert run(platform, node, models, "chat") == {"chat": BUSY}


def test_langchain(platform: Platform, upstream: Upstream, python: Path) -> None:
    program, models = [str(python), str(CLIENTS / "langchain_client.py")], (CHAT, COMPLETION)
    chats(upstream)
    told = run(platform, program, models, "chat", "chat_stream", "embeddings", *ERRORS)
    assert told == {"chat": ANSWER, "chat_stream": ANSWER, "embeddings": [384, 384], **ERRORS}
    upstream.says(called("look", '{"where": "here"}'), ended("tool_calls"), usage(5, 9))
    (call,) = run(platform, program, models, "tools")["tools"]
    assert (call["name"], call["args"]) == ("look", {"where": "here"})
    completes(upstream)
    assert run(platform, program, models, "text", "text_stream") == {"text": "Hi there", "text_stream": "Hi there"}
    refuses(upstream)
    assert run(platform, program, models, "chat") == {"chat": BUSY}


def test_llamaindex(platform: Platform, upstream: Upstream, python: Path) -> None:
    program, models = [str(python), str(CLIENTS / "llamaindex_client.py")], (KNOWN, COMPLETION)
    chats(upstream)
    told = run(platform, program, models, "chat", "chat_stream", "text", "text_stream", "embeddings", *ERRORS)
    said_whole = dict.fromkeys(("chat_stream", "text", "text_stream"), "Hi there")
    assert told == {"chat": ANSWER, **said_whole, "embeddings": [384, 384], **ERRORS}
    refuses(upstream)
    assert run(platform, program, models, "chat") == {"chat": BUSY}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The program and its script."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "node_client.mjs"):
        shutil.copy(CLIENTS / name, folder)
    command = ["npm", "ci", "--silent", "--no-audit", "--no-fund"]
    if shutil.which("npm") is None or subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=150).returncode:
        pytest.skip("Node or its registry is not there: the Node SDK was NOT tried")
    return ["node", str(folder / "node_client.mjs")]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with LangChain and LlamaIndex."""
    uv, interpreter = uv_program(), tmp_path_factory.mktemp("python") / "bin" / "python"
    commands = [
        [uv, "venv", "--quiet", "--python", sys.executable, str(interpreter.parents[1])],
        [uv, "pip", "sync", "--quiet", "--python", str(interpreter), "--require-hashes", str(CLIENTS / "requirements.lock")],
    ]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    for command in commands:
        if subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300).returncode:
            pytest.skip("The package registry is not there: LangChain and LlamaIndex were NOT tried")
    return interpreter


@pytest.fixture(scope="module", autouse=True)
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """LangChain counts tokens before it asks for embeddings, and would fetch the ranks: where tiktoken looks first, they are."""
    folder = tmp_path_factory.mktemp("ranks")
    for packed in (resources.files("tessera.encodings") / "data").iterdir():
        if packed.name.endswith(".gz"):
            url = RANKS.format(name=packed.name.removesuffix(".gz"))
            (folder / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).write_bytes(gzip.decompress(packed.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield


def run(platform: Platform, program: list[str], models: tuple[str, str], *wanted: str) -> dict[str, Any]:
    """What the client printed."""
    given = [*program, *models, EMBEDDING, *wanted]
    environment = {**os.environ, "TESSERA_URL": platform.url, "TESSERA_API_KEY": platform.admin_key}
    done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-4_000:]
    results: dict[str, Any] = json.loads(done.stdout)
    return results
