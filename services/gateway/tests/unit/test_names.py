"""Other names of models: which one a name stands for, and what is told of it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tessera.contracts.events import EmbeddingCompleted, ModelDeclared, ModelReference
from tessera.gateway.domain.directories import ModelDirectory
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.names import ModelNames
from tessera.gateway.settings import GatewaySettings

pytestmark = pytest.mark.unit

NAMES = {
    "gpt-4o": "large",
    "gpt-*": "small",
    "gpt-4*": "large",
    "*-mini": "tiny",
    "local/q*": "quoting",
    "*": "any",
    "chat": "shadowed",
}


def directory(*model_ids: str, names: dict[str, str] | None = None, **more: Any) -> ModelDirectory:
    models = ModelDirectory()
    models.names = ModelNames(NAMES if names is None else names)
    for model_id in model_ids:
        reference = ModelReference(model_id=model_id, provider="p", capability="chat", encoding="e", template="t", exact=True)
        models.declare(ModelDeclared(model=reference, description="d", owned_by="o", **more), datetime(2026, 11, 28, tzinfo=UTC))
    return models


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gpt-4o", "large"),  # an alias before every pattern
        ("gpt-4.1", "large"),  # the longer of two patterns
        ("gpt-5", "small"),
        ("gpt-4-mini", "tiny"),  # as long as gpt-4*, and first in the alphabet
        ("claude", "any"),
        ("org/line\nbreak", "any"),
        ("local/quote", "quoting"),
        ("local/nothing", None),  # `*` does not take the platform's own engines
        ("gpt-4+mini", "large"),  # nothing but `*` has a meaning of its own
    ],
)
def test_which_model_a_name_stands_for(name: str, target: str | None) -> None:
    assert ModelNames(NAMES).target(name) == target


@given(st.permutations(sorted(NAMES)), st.text(alphabet="gpt-4o*mini/loca", max_size=12))
def test_the_order_in_which_names_are_written_means_nothing(order: list[str], name: str) -> None:
    assert ModelNames({key: NAMES[key] for key in order}).target(name) == ModelNames(NAMES).target(name)


@given(st.text(max_size=20))
def test_a_pattern_matches_what_it_says_literally(text: str) -> None:
    literal = text.replace("*", "")
    names = ModelNames({f"x{literal}*": "target"})
    assert names.target(f"x{literal}") == names.target(f"x{literal}anything") == "target"
    assert names.target(f"y{literal}") is None


def test_a_declared_model_always_means_itself() -> None:
    assert directory("chat", "shadowed").find("chat").declaration.model.model_id == "chat"


def test_aliases_are_listed_with_their_model_and_patterns_are_not() -> None:
    listed = {name: model.declaration.model.model_id for name, model in directory("large", "chat").all().items()}
    assert listed == {
        "chat": "chat",
        "gpt-4o": "large",
        "large": "large",
    }


@pytest.mark.parametrize(
    ("declared", "capability", "status", "code"),
    [((), "chat", 404, "model_not_found"), (("large",), "embedding", 400, "unsupported_model")],
)
def test_an_alias_is_refused_under_the_name_that_was_asked_for(declared: tuple[str, ...], capability: Any, status: int, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        directory(*declared).offering("gpt-4o", capability)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert "gpt-4o" in refused.value.message


def test_an_alias_of_a_model_that_is_away_is_not_listed_and_says_so() -> None:
    models = directory("large", available=False)
    assert models.all() == {}
    with pytest.raises(ApiError, match=r"gpt-4o.*not available now"):
        models.offering("gpt-4o", "chat")


def test_before_all_models_are_known_a_name_may_still_be_a_models_own() -> None:
    models = directory("large")
    models.is_complete = lambda: False
    with pytest.raises(ApiError) as refused:
        models.find("gpt-4o")
    assert (refused.value.status, models.find("large").declaration.model.model_id) == (503, "large")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ('{"gpt-*": "my-*"}', "must stand for one model"),
        ('{"a": "b", "b": "c"}', "is an alias itself"),
        ('{"": "b"}', "must not be empty"),
        ('{"a": ""}', "must not be empty"),
        ('["a"]', "model_aliases"),
    ],
)
def test_names_that_cannot_be_meant_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str, complaint: str) -> None:
    monkeypatch.setenv("TESSERA_GATEWAY__MODEL_ALIASES", value)
    with pytest.raises(ValidationError, match=complaint):
        GatewaySettings()


async def test_the_answer_names_the_model_that_gave_it(desk: Any) -> None:
    desk.rooms.models.names = ModelNames({"text-embedding-*": "vectors", "my-chat": "chat"})
    desk.log.answers.append(EmbeddingCompleted(model="vectors", vectors=((1.0,),), token_counts=(1,)))
    async with desk.client() as client:
        embedded = (await client.post("/v1/embeddings", json={"model": "text-embedding-3-small", "input": "x"})).json()
        listed = (await client.get("/v1/models")).json()["data"]
        one = (await client.get("/v1/models/text-embedding-3-small")).json()
        wrong = await client.post("/v1/chat/completions", json={"model": "text-embedding-3-small", "messages": []})
    assert (embedded["model"], desk.log.published[0][0].model) == ("vectors", "vectors")
    assert [(model["id"], model["tessera"]["alias_of"]) for model in listed] == [
        ("chat", None),
        ("my-chat", "chat"),
        ("text", None),
        ("vectors", None),
    ]
    assert (one["id"], one["tessera"]["alias_of"]) == ("text-embedding-3-small", "vectors")
    assert wrong.status_code == 400
