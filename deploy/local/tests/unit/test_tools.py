"""One clear sentence for what a machine is missing."""

from pathlib import Path

import pytest

from tessera.local import tools
from tessera.local.errors import MissingToolError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return folder


def _program(folder: Path, name: str, stderr: str = "") -> str:
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{stderr}' >&2\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(("find", "what"), [(tools.java, "Java"), (tools.maven, "Maven")])
def test_a_missing_program_is_named_with_the_alternatives(path: Path, find: object, what: str) -> None:
    with pytest.raises(MissingToolError, match=f"^{what} is missing: install .*docker compose up.*KAFKA_BOOTSTRAP_SERVERS"):
        find()  # type: ignore[operator]


def test_java_that_is_too_old_is_refused(path: Path) -> None:
    _program(path, "java", 'openjdk version "11.0.2"')
    with pytest.raises(MissingToolError, match=r"Java 17 or newer is needed, .*11\.0\.2"):
        tools.java()


@pytest.mark.parametrize("version", ["17.0.15", "21", "26-ea"])
def test_new_enough_java_is_found(path: Path, version: str) -> None:
    program = _program(path, "java", f'openjdk version "{version}" 2026-01-01')
    assert tools.java() == program


def test_java_home_comes_before_the_path(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(path, "java", 'openjdk version "11"')
    home = tmp_path / "jdk" / "bin"
    home.mkdir(parents=True)
    program = _program(home, "java", 'openjdk version "21"')
    monkeypatch.setenv("JAVA_HOME", str(home.parent))
    assert tools.java() == program


def test_maven_is_needed_only_until_kafka_is_cached(path: Path) -> None:
    _program(path, "java", 'openjdk version "21"')
    assert len(list(tools.missing(kafka_is_given=False, kafka_is_cached=False))) == 1
    assert list(tools.missing(kafka_is_given=False, kafka_is_cached=True)) == []


def test_nothing_is_needed_beside_a_given_kafka(path: Path) -> None:
    assert list(tools.missing(kafka_is_given=True, kafka_is_cached=False)) == []


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "PYTHON_MINIMUM", (99, 0))
    with pytest.raises(MissingToolError, match=r"Python 99\.0 or newer is needed"):
        tools.python()
