"""One setting attaches a provider; what is wrong is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tessera.generator.settings import GeneratorSettings

pytestmark = pytest.mark.unit


def settings(monkeypatch: pytest.MonkeyPatch, providers: Any) -> GeneratorSettings:
    monkeypatch.setenv("TESSERA_GENERATOR__PROVIDERS", json.dumps(providers))
    monkeypatch.setenv("TESSERA_GENERATOR__POSTGRES__WORKER_PASSWORD", "only-for-tests")
    monkeypatch.setenv("TESSERA_GENERATOR__POSTGRES__CLIENT_PASSWORD", "only-for-tests")
    return GeneratorSettings()


def test_one_variable_attaches_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = {
        "name": "vllm",
        "base_url": "http://127.0.0.1:8000/v1",
        "api_key": "sk-secret",
        "models": ["llama", {"id": "base", "capability": "completion"}],
    }
    found = settings(monkeypatch, [provider])
    declared = {model.reference.model_id: model.declaration().model for model in found.catalogue().models}
    assert set(declared) == {"local/ngram", "local/quote", "llama", "base"}
    assert (declared["llama"].template, declared["base"].template, declared["llama"].exact) == ("openai-chat", "text", False)
    assert "sk-secret" not in repr(found)


def test_local_engines_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {model.reference.model_id: model for model in settings(monkeypatch, []).catalogue().models}
    assert models["local/ngram"].reference.capability == "completion"
    assert "no chat model" in models["local/ngram"].description
    assert "only with sentences from recalled memories" in models["local/quote"].description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "at least 1 item"),
        ({"base_url": "vllm:8000"}, "URL"),
        ({"name": "local/quote"}, "pattern"),
        ({"models": ["local/ngram"]}, "offered twice"),
        ({"models": ["a", "a"]}, "offered twice"),
        ({"models": [{"id": "a", "encoding": "p50k"}]}, "unknown encoding"),
        ({"models": [{"id": "a", "template": "jinja"}]}, "unknown template"),
        ({"apikey": "typo"}, "not permitted"),
    ],
)
def test_wrong_providers(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    provider = {"name": "vllm", "base_url": "http://127.0.0.1:8000/v1", "models": ["llama"], **change}
    with pytest.raises(ValidationError, match=message):
        settings(monkeypatch, [provider])


def test_two_providers_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = {"name": "vllm", "base_url": "http://127.0.0.1:8000/v1", "models": ["llama"]}
    with pytest.raises(ValidationError, match="same name"):
        settings(monkeypatch, [provider, {**provider, "models": ["other"]}])
