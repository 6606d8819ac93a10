"""Each schema rule fails on a planted incompatible change."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tessera.contracts import EVENT_TYPES, MessagePublished
from tessera.contracts.compatibility import incompatibilities, opened_schema
from tessera.contracts.documents import asyncapi, events_page
from tessera.contracts.schemas import SchemaStore, main, problems, reader_schema, writer_schema

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Inner(_Closed):
    value: int
    children: tuple["_Inner", ...] = ()


class _Old(_Closed):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    kind: Literal["a", "b"] = "a"
    count: Annotated[int, Field(ge=0, le=10)] = 0
    inner: _Inner | None = None
    tags: dict[str, int] = {}
    code: Annotated[str | None, Field(pattern="^[a-z]$")] = None


class _WithOptional(_Old):
    note: str | None = None


class _WithRequired(_Old):
    note: str


class _WiderEnum(_Old):
    kind: Literal["a", "b", "c"] = "a"  # type: ignore[assignment]


class _Longer(_Old):
    name: Annotated[str, Field(min_length=1, max_length=200)]


class _Looser(_Old):
    count: Annotated[int, Field(ge=-5, le=10)] = 0


class _OtherType(_Old):
    count: str = ""  # type: ignore[assignment]


class _OtherPattern(_Old):
    code: Annotated[str | None, Field(pattern="^[0-9]$")] = None


class _OtherValues(_Old):
    tags: dict[str, str] = {}  # type: ignore[assignment]


class _Freer(_Old):
    kind: str = "a"  # type: ignore[assignment]


def _differences(writer: type[BaseModel], reader: type[BaseModel]) -> list[str]:
    return incompatibilities(writer.model_json_schema(), opened_schema(reader.model_json_schema()))


def test_an_optional_field_comes_and_goes() -> None:
    assert _differences(_WithOptional, _Old) == []
    assert _differences(_Old, _WithOptional) == []


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (_Old, _WithRequired),
        (_WiderEnum, _Old),
        (_Longer, _Old),
        (_Looser, _Old),
        (_OtherType, _Old),
        (_Old, _OtherType),
        (_OtherPattern, _Old),
        (_OtherValues, _Old),
        (_Freer, _Old),
    ],
)
def test_an_incompatible_change_is_found(writer: type[BaseModel], reader: type[BaseModel]) -> None:
    assert _differences(writer, reader)


def test_a_schema_reads_itself_also_when_recursive() -> None:
    assert _differences(_Old, _Old) == []


@pytest.fixture
def store(tmp_path: Path) -> SchemaStore:
    for name in ("schemas", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return SchemaStore(tmp_path)


def _found(store: SchemaStore) -> str:
    return "\n".join(problems(store, with_history=False))


def test_the_committed_schemas_keep_every_rule() -> None:
    assert problems(SchemaStore(ROOT)) == []


def test_an_edited_revision_is_found(store: SchemaStore) -> None:
    store.revisions(MessagePublished)[0].path.write_text('{"writer": {}, "reader": {}}')
    assert "never changes" in _found(store)


def test_a_removed_revision_is_found(store: SchemaStore) -> None:
    store.revisions(MessagePublished)[0].path.unlink()
    assert "is in the lock but gone" in _found(store)


def test_a_class_without_its_revision_is_found(store: SchemaStore) -> None:
    shutil.rmtree(store.revisions(MessagePublished)[0].path.parent)
    assert "differs from its newest revision" in _found(store)


def test_an_unlocked_file_is_found(store: SchemaStore) -> None:
    path = store.revisions(MessagePublished)[0].path
    shutil.copy(path, path.with_name("r2.json"))
    assert "is not locked" in _found(store)


def test_an_older_revision_that_required_less_is_found(store: SchemaStore) -> None:
    path = store.revisions(MessagePublished)[0].path
    stored = json.loads(path.read_text())
    for side in stored.values():
        side["required"] = ["content"]
    path.write_text(json.dumps(stored))
    assert "the reader requires it" in _found(store)


def test_an_example_that_no_longer_validates_is_found(store: SchemaStore, tmp_path: Path) -> None:
    example = next((tmp_path / "examples" / "message.published" / "v1").glob("*.json"))
    example.write_text('{"attributes": {}, "data": {"role": "robot"}}')
    assert "does not validate" in _found(store)


def test_a_type_without_example_is_found(store: SchemaStore, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "examples" / "message.published")
    assert "has no example" in _found(store)


def test_writing_restores_what_is_missing_and_is_idempotent(store: SchemaStore) -> None:
    shutil.rmtree(store.revisions(MessagePublished)[0].path.parent)
    assert len(store.write()) == 1
    assert store.write() == []


def test_a_lock_that_shrinks_is_found_in_history(store: SchemaStore, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    path = store.revisions(MessagePublished)[0].path
    path.unlink()
    store.lock_path.write_text(json.dumps(store.hashes()))
    assert any("an earlier commit's lock but gone" in problem for problem in problems(store))


def test_the_command_writes_and_checks(store: SchemaStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["init", "-q"],):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@e.org", "commit", "-qm", "x", "--allow-empty"], check=True
    )
    shutil.rmtree(store.revisions(MessagePublished)[0].path.parent)
    assert main(["check", str(tmp_path)]) == 1
    assert "message.published" in capsys.readouterr().err
    assert main(["write", str(tmp_path)]) == 0
    assert "new revision" in capsys.readouterr().out


@pytest.mark.parametrize("event_type", sorted(EVENT_TYPES))
def test_every_example_is_valid_json_schema_and_reads_back(event_type: str) -> None:
    event = EVENT_TYPES[event_type]
    for name, example in SchemaStore(ROOT).examples(event).items():
        jsonschema.validate(example["data"], writer_schema(event))
        jsonschema.validate({**example["data"], "unknown_yet": 1}, reader_schema(event))
        data = event.model_validate(example["data"])
        again: Any = event.model_validate_json(data.model_dump_json())
        assert again == data, name
        assert example["attributes"]["type"] == event_type


def test_the_documents_name_every_topic_and_type() -> None:
    store = SchemaStore(ROOT)
    page, document = events_page(store), asyncapi(store)
    assert all(event_type in page and event_type in document["components"]["messages"] for event_type in EVENT_TYPES)
    text = json.dumps(document)
    for reference in set(_references(document)):
        assert _resolves(document, reference), reference
    assert document["asyncapi"] == "3.0.0"
    assert "memory.recorded" in text


def _references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for item in value for found in _references(item)]
    if not isinstance(value, dict):
        return []
    here = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return here + [found for item in value.values() for found in _references(item)]


def _resolves(document: Any, reference: str) -> bool:
    for part in reference.removeprefix("#/").split("/"):
        if part not in document:
            return False
        document = document[part]
    return True
