"""Settings of a running gateway: taken from the file as soon as it is written, all of them or none."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tessera.contracts.events import EmbeddingCompleted, EmbeddingRequested
from tessera.testkit import eventually_blocking

pytestmark = pytest.mark.integration

PAGE = "https://app.example.com"
GOOD = f"""
TESSERA_GATEWAY__MODEL_ALIASES='{{"GPT-4o": "remote/chat", "text-embedding-*": "local/minilm"}}'
TESSERA_GATEWAY__CORS_ORIGINS='["{PAGE}"]'
TESSERA_GATEWAY__LIMITS__KEY__REQUESTS_PER_MINUTE=100000
"""


@pytest.fixture
def client(gateway: Any) -> Iterator[httpx.Client]:
    with gateway.http() as opened:
        opened.headers["origin"] = PAGE
        yield opened
        gateway.settings.write_text("")
        eventually_blocking(lambda: seen(opened) == ([], None, None))


def seen(client: httpx.Client) -> tuple[list[str], str | None, str | None]:
    """What a client notices of aliases, CORS and limits."""
    listed = client.get("/v1/models")
    aliases = [model["id"] for model in listed.json()["data"] if model["tessera"]["alias_of"]]
    return aliases, listed.headers.get("access-control-allow-origin"), listed.headers.get("x-ratelimit-limit-requests")


TAKEN = (["GPT-4o"], PAGE, "100000")


def test_names_origins_and_limits_change_together_and_what_is_wrong_changes_none_of_them(gateway: Any, client: httpx.Client) -> None:
    gateway.settings.write_text(GOOD)
    noticed = []

    def taken() -> bool:
        noticed.append(seen(client))
        return noticed[-1] == TAKEN

    eventually_blocking(taken)
    assert [each for each in noticed if each not in (([], None, None), TAKEN)] == []
    _ask_by_another_name(gateway)
    gateway.settings.write_text(GOOD.replace("100000", "5") + "TESSERA_GATEWAY__PUBLISH_TIMEOUT_SECONDS=4")
    assert client.post("/v1/services/gateway/control", json={"action": "reload"}).status_code == 202
    eventually_blocking(lambda: "a restart is needed" in refusals(gateway))
    assert seen(client) == TAKEN


def refusals(gateway: Any) -> str:
    return "".join(record.get("problems", "") for record in gateway.process.log_records())


def _ask_by_another_name(gateway: Any) -> None:
    answer = EmbeddingCompleted(model="local/minilm", vectors=((1.0, 0.0),), token_counts=(1,))
    gateway.peer.on(EmbeddingRequested, lambda heard: [answer] if heard.data["model"] == "local/minilm" else [])
    with gateway.openai() as openai:
        made = openai.embeddings.create(model="text-embedding-3-small", input="x", encoding_format="float")
        assert openai.models.retrieve("GPT-4o").id == "GPT-4o"
    assert (made.model, made.data[0].embedding) == ("local/minilm", [1.0, 0.0])
