"""What the commands say before anything runs."""

import json
from pathlib import Path

import pytest

from tessera.local import cli
from tessera.local.plan import port_names
from tessera.local.ports import free_ports
from tessera.local.settings import LocalSettings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("TESSERA_HOME", str(folder))
    return folder


@pytest.mark.parametrize("command", ["env", "tour", "status"])
def test_what_needs_a_platform_says_how_to_start_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "Tessera is not running: `make run` starts it.\n"


def test_stopping_nothing_makes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stop"]) == 0
    assert capsys.readouterr().out == "Nothing is running.\n"
    assert not home.exists()


def test_status_of_a_stopped_platform_names_every_process(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    ports = free_ports(port_names(LocalSettings()))
    (home / "ports.json").write_text(json.dumps(ports))
    assert cli.main(["status"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:4] == ["kafka", "postgres", "redis", "gateway-1"]
    assert all("STOPPED" in line and "silent" in line for line in lines)
    assert json.loads((home / "ports.json").read_text()) == ports


def test_logs_of_nobody_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "nobody"]) == 1
    assert "No logs of nobody" in capsys.readouterr().err


def test_clean_keeps_downloads_unless_told_otherwise(home: Path) -> None:
    for name in ("cache", "kafka", "logs", "venv"):
        (home / name).mkdir(parents=True)
    (home / "secrets.json").write_text("{}")
    assert cli.main(["clean"]) == 0
    assert sorted(entry.name for entry in home.iterdir()) == ["cache", "venv"]
    assert cli.main(["clean", "all"]) == 0
    assert [entry.name for entry in home.iterdir()] == ["venv"]


def test_what_only_setup_made_is_no_platform(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "venv").mkdir(parents=True)
    assert cli.main(["stop"]) == 0
    assert capsys.readouterr().out == "Nothing is running.\n"
    assert cli.main(["status"]) == 1
    assert [entry.name for entry in home.iterdir()] == ["venv"]


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "status", interrupted)
    assert cli.main(["status"]) == 130
    assert "`make run` continues, `make stop` ends it" in capsys.readouterr().err
