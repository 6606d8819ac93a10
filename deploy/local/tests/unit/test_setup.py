"""`make setup` and `make doctor`."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tessera.local import setup
from tessera.local.errors import LocalError, MissingToolError
from tessera.local.files import locked


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    member = tmp_path / "libs" / "one"
    member.mkdir(parents=True)
    (member / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / ".tessera" / "venv").mkdir(parents=True)
    monkeypatch.setattr(setup, "CHECKOUT", tmp_path)
    monkeypatch.setattr(setup, "ENVIRONMENT", tmp_path / ".tessera" / "venv")
    monkeypatch.setattr(setup, "_LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(setup, "_STAMP", tmp_path / ".tessera" / "venv" / "stamp")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "broker:9092")
    return tmp_path


def _refuse(*command: str) -> None:
    raise LocalError(f"asked to run {command}")


def test_nothing_is_done_when_nothing_changed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".tessera" / "venv" / "stamp").write_text(setup.fingerprint())
    monkeypatch.setattr(setup, "_run", _refuse)
    assert setup.main([]) == 0


@pytest.mark.parametrize("changed", ["requirements.lock", "libs/one/pyproject.toml"])
def test_a_changed_lock_or_member_renews_the_environment(checkout: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    (checkout / ".tessera" / "venv" / "stamp").write_text(setup.fingerprint())
    (checkout / changed).write_text("# another")
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup, "_run", lambda *command: commands.append(command))
    monkeypatch.setattr("shutil.which", lambda _: "/bin/uv")
    assert setup.main([]) == 0
    words = [" ".join(command) for command in commands]
    assert any("pip sync" in line and "--require-hashes" in line for line in words)
    assert any("--no-deps" in line and f"--editable {checkout / 'libs' / 'one'}" in line for line in words)
    assert (checkout / ".tessera" / "venv" / "stamp").read_text() == setup.fingerprint()


def test_a_second_setup_waits_for_the_first_and_does_nothing_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, is_made = threading.Event(), setup._is_made

    def looking(wanted: str) -> bool:
        found = is_made(wanted)
        looked.set()
        return found

    monkeypatch.setattr(setup, "_is_made", looking)
    monkeypatch.setattr(setup, "_run", _refuse)
    with ThreadPoolExecutor(1) as other:
        with locked(checkout / ".tessera" / "setup.lock"):
            second = other.submit(setup.main, [])
            assert looked.wait(10)
            (checkout / ".tessera" / "venv" / "stamp").write_text(setup.fingerprint())
        assert second.result(10) == 0


def test_a_failed_step_leaves_the_environment_unfinished(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / ".tessera" / "venv" / "bin").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda _: "/bin/false")
        assert setup.main([]) == 1
    assert "failed; its message stands above" in capsys.readouterr().err
    assert not (checkout / ".tessera" / "venv" / "stamp").exists()


def test_a_missing_program_is_told_before_anything_is_fetched(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "missing", lambda **_: iter(["Java is missing: install it."]))
    monkeypatch.setattr(setup, "_run", _refuse)
    assert setup.main([]) == 1
    assert capsys.readouterr().err == "Java is missing: install it.\n"


def test_doctor_names_what_is_missing(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(setup, "missing", lambda **_: iter(["Java is missing: install it."]))
    assert setup.main(["--doctor"]) == 1
    assert capsys.readouterr().out == "missing  Java is missing: install it.\n"


def test_doctor_says_that_all_is_here(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["--doctor"]) == 0
    assert "Everything that is needed is here" in capsys.readouterr().out


def test_doctor_looks_for_java_and_maven_without_a_given_kafka(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS")
    monkeypatch.setenv("PATH", str(checkout))
    monkeypatch.setenv("TESSERA_HOME", str(checkout / "state"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert setup.main(["--doctor"]) == 1
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["Java", "Maven"]


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS=broker:9092\n", True),
        ("OTHER=1\nexport TESSERA__KAFKA__BOOTSTRAP_SERVERS = 'broker:9092'\n", True),
        ("KAFKA_BOOTSTRAP_SERVERS=\nOTHER=1\n", False),
        ("# KAFKA_BOOTSTRAP_SERVERS=broker:9092\n", False),
        ("KAFKA_BOOTSTRAP_SERVERS=''\n", False),
    ],
)
def test_a_kafka_in_the_settings_file_needs_no_java(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, given: bool
) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS")
    monkeypatch.setenv("PATH", str(checkout))
    monkeypatch.setenv("TESSERA_HOME", str(checkout / "state"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    (checkout / ".env").write_text(text)
    assert (setup.main(["--doctor"]) == 0) == given
    assert ("Java is missing" not in capsys.readouterr().out) == given


def test_without_venv_the_message_says_what_to_install(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(setup, "cache", lambda: checkout / "cache")
    monkeypatch.setattr(setup, "_run", _refuse)
    with pytest.raises(LocalError, match=r"install it .*python3-venv"):
        setup.uv_program()


def test_missing_tools_are_local_errors() -> None:
    assert issubclass(MissingToolError, LocalError)
