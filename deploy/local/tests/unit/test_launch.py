"""The way from a launch to the server: locks, ports, variables, identity, and an end with the parent."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tessera.local.identity import identity
from tessera.local.launch import EXIT_LOCKED, EXIT_PORT_TAKEN, record
from tessera.local.ports import LOOPBACK
from tessera.local.processes import recorded
from tessera.testkit import eventually_blocking


def _launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tessera.local.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_the_program_gets_its_folder_and_variables(tmp_path: Path) -> None:
    variables = tmp_path / "variables.json"
    variables.write_text(json.dumps({"A_SECRET": "with $ and 'quotes'"}))
    done = _launch("--cwd", str(tmp_path), "--environment", str(variables), "--", "sh", "-c", 'pwd; printf %s "$A_SECRET"')
    assert done.stdout == f"{tmp_path.resolve()}\nwith $ and 'quotes'"


def test_settings_that_are_not_given_do_not_linger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA__PROFILE", "production")
    (tmp_path / "variables.json").write_text("{}")
    done = _launch("--environment", str(tmp_path / "variables.json"), "--", "sh", "-c", 'printf %s "${TESSERA__PROFILE-unset}"')
    assert done.stdout == "unset"


def test_a_lock_that_another_process_holds_refuses_the_start(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = _launch("--lock", str(tmp_path / "lock"), "--", "true")
    assert done.returncode == EXIT_LOCKED
    assert "another process holds" in done.stderr


def test_the_lock_lasts_as_long_as_the_program(tmp_path: Path) -> None:
    done = _launch(
        "--lock", str(tmp_path / "lock"), "--", sys.executable, "-m", "tessera.local.launch", "--lock", str(tmp_path / "lock"), "--", "true"
    )
    assert done.returncode == EXIT_LOCKED


def test_a_port_that_another_process_holds_refuses_the_start() -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        done = _launch("--port", str(listener.getsockname()[1]), "--", "true")
    assert done.returncode == EXIT_PORT_TAKEN
    assert "is in use by another process" in done.stderr


def test_the_record_names_the_program(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    process = subprocess.Popen([sys.executable, "-m", "tessera.local.launch", "--record", str(file), "--", "sleep", "60"])
    found = eventually_blocking(lambda: recorded(file))
    assert found.pid == process.pid
    process.kill()
    process.wait()
    assert recorded(file) is None


def test_a_reused_process_id_is_not_taken_for_the_program(tmp_path: Path) -> None:
    file, mine = tmp_path / "record.json", identity(os.getpid())
    file.write_text(json.dumps(mine))
    assert recorded(file) == psutil.Process()
    for other in ({**mine, "ticks": int(mine["ticks"]) - 1}, {**mine, "boot": "another"}):
        file.write_text(json.dumps(other))
        assert recorded(file) is None


def test_a_clock_that_is_set_makes_nobody_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    record(file)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
    assert recorded(file) is not None


def test_a_record_of_a_former_version_still_names_its_program(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for seconds, found in ((0, psutil.Process()), (-60, None)):
        file.write_text(json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time() + seconds}))
        assert recorded(file) == found


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_a_broken_record_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert recorded(tmp_path / "record.json") is None


@pytest.mark.parametrize("user", [None, "nobody"])
def test_the_program_ends_when_its_parent_is_killed(tmp_path: Path, user: str | None) -> None:
    if user and os.geteuid() != 0:
        pytest.skip("NOT TESTED HERE: only root can start a program as another user")
    record = tmp_path / "record.json"
    as_user = ["--user", user, "--traverse"] if user else []
    inner = [sys.executable, "-m", "tessera.local.launch", "--death-signal", "TERM", "--record", str(record), *as_user, "--", "sleep", "60"]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({inner!r})"])
    child = eventually_blocking(lambda: recorded(record))
    eventually_blocking(lambda: child.name() == "sleep")
    if user:
        assert child.username() == user
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert psutil.wait_procs([child], 10)[1] == []
