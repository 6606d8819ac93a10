"""What `make` says in a checkout where nothing was ever set up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tessera.local.folders import CHECKOUT


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CHECKOUT / "Makefile", folder)
    apart = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }  # not a part of `make test`
    return subprocess.run(["make", *words], cwd=folder, env=apart, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [["status"], ["logs"], ["env"], ["tour"], ["trace", "ID=1"]])
def test_what_needs_a_platform_says_how_to_get_one(tmp_path: Path, words: list[str]) -> None:
    done = _make(tmp_path, *words)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "Nothing is set up here yet: `make run` does it."


@pytest.mark.parametrize("target", ["stop", "clean"])
def test_stopping_and_cleaning_nothing_is_no_error(tmp_path: Path, target: str) -> None:
    done = _make(tmp_path, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert [file.name for file in tmp_path.iterdir()] == ["Makefile"]


def test_cleaning_all_deletes_downloads_and_environment_and_nothing_else(tmp_path: Path) -> None:
    for name in ("venv", "cache", "own"):
        (tmp_path / ".tessera" / name).mkdir(parents=True)
    assert _make(tmp_path, "clean").returncode == 0
    assert (tmp_path / ".tessera" / "venv").exists()
    assert _make(tmp_path, "clean", "ALL=yes").returncode == 0
    assert [file.name for file in (tmp_path / ".tessera").iterdir()] == ["own"]


def test_make_alone_lists_every_target_with_what_it_does(tmp_path: Path) -> None:
    listed = [line.split()[1] for line in _make(tmp_path).stdout.splitlines()]
    declared = next(line for line in (CHECKOUT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert sorted(listed) == sorted(declared.split()[1:])
