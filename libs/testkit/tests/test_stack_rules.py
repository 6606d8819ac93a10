"""Where the stack comes from, and that nothing of a killed run stays."""

import tempfile
from pathlib import Path

import pytest

from tessera.local.errors import LocalError, MissingToolError
from tessera.local.launch import record
from tessera.testkit import Stack, containers
from tessera.testkit.plugin import suite_of
from tessera.testkit.stack import _available, remove_abandoned

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_given_address_where_nothing_answers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    with pytest.raises(LocalError, match="KAFKA_BOOTSTRAP_SERVERS is set, but nothing answers there"):
        Stack().start()
    assert list(tmp_path.iterdir()) == []


def _missing() -> None:
    raise MissingToolError("Java is missing")


def test_without_recipe_and_without_docker_the_reason_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "engine_answers", lambda: False)
    with pytest.raises(MissingToolError, match="Java is missing"):
        _available(_missing)


def test_without_recipe_a_docker_engine_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "engine_answers", lambda: True)
    assert not _available(_missing)


def test_a_docker_command_without_an_engine_is_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not containers.engine_answers()
    monkeypatch.setenv("PATH", "")
    assert not containers.engine_answers()


def test_folders_of_killed_runs_are_removed_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    dead, alive, foreign = (tmp_path / f"tessera-test-{name}" for name in ("dead", "alive", "foreign"))
    for folder in (dead, alive, foreign):
        folder.mkdir()
    (dead / "owner.json").write_text('{"pid": 1, "started": 0}')
    record(alive / "owner.json")
    remove_abandoned()
    assert sorted(tmp_path.iterdir()) == [alive, foreign]


@pytest.mark.parametrize(
    ("node_id", "words", "suite"),
    [
        ("libs/a/tests/test_a.py::test_b", {"unit"}, "unit"),
        ("tests/e2e/test_a.py::test_b", {"chaos"}, "chaos"),
        ("libs/a/tests/integration/test_a.py::test_unit", set(), "integration"),
        ("libs/a/tests/test_a.py::test_e2e", set(), "unit"),
    ],
)
def test_a_test_belongs_to_the_suite_of_its_marker_else_of_its_folder(node_id: str, words: set[str], suite: str) -> None:
    assert suite_of(node_id, words) == suite
