"""What is published keeps its contract: an event can only be made through its validation, and nobody goes around it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from tessera.contracts.base import Record
from tessera.contracts.catalogue import EVENT_TYPES
from tessera.contracts.events import MessagePublished, ServiceControlled

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]


def _attributes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr


def test_no_code_that_is_deployed_makes_an_event_past_its_validation() -> None:
    sources = [path for folder in ("libs", "services") for path in ROOT.glob(f"{folder}/*/src/**/*.py")]
    assert len(sources) > 100
    assert [
        str(path) for path in sources if {"model_construct", "__setattr__"} & set(_attributes(path)) and "testkit" not in path.parts
    ] == []


def test_a_writer_is_closed() -> None:
    assert all(issubclass(event, Record) and event.model_config["extra"] == "forbid" for event in EVENT_TYPES.values())
    with pytest.raises(ValidationError):
        MessagePublished.model_validate({"conversation_id": "c", "role": "user", "content": "x", "planted": 1})


def test_an_event_cannot_be_changed_into_an_invalid_one() -> None:
    command = ServiceControlled(service="memory", action="pause")
    with pytest.raises(ValidationError):
        command.action = "explode"  # type: ignore[assignment]
    with pytest.raises(ValidationError):
        command.model_copy(update={"action": "explode"})
    assert command.model_copy(update={"action": "resume"}) == ServiceControlled(service="memory", action="resume")
    assert command.model_copy() == command
