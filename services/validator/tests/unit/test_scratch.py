"""What a killed validator left is gone at the next start; what a living one uses stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tessera.validator.adapters.scratch import ScratchFolder
from tessera.validator.settings import ValidatorSettings

pytestmark = pytest.mark.unit

_HOLDER = """
import sys
from pathlib import Path
from tessera.validator.adapters.scratch import ScratchFolder
print(ScratchFolder.take(Path(sys.argv[1])).path, flush=True)
sys.stdin.read()
"""


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    leftover = tmp_path / "process-dead" / "tmpabc"
    leftover.mkdir(parents=True)
    (leftover / "0.csv").write_text("a\n1\n")
    (leftover.parent / "in-use").touch()
    (tmp_path / "process-died-before-its-lock").mkdir()
    (tmp_path / "somebody-elses").mkdir()
    scratch = ScratchFolder.take(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"sweeping", "somebody-elses", scratch.path.name}
    scratch.release()


def test_the_folder_of_a_living_process_stays_until_it_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        (held / "0.csv").write_text("a\n1\n")
        own = ScratchFolder.take(tmp_path)
        assert (held / "0.csv").exists()
        assert own.path != held
        holder.communicate("")
    assert held.exists()
    third = ScratchFolder.take(tmp_path)
    assert not held.exists()
    assert own.path.exists()
    own.release()
    third.release()


def test_a_clean_end_leaves_no_folder(tmp_path: Path) -> None:
    ScratchFolder.take(tmp_path).release()
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweeping"]


def _default() -> Path:
    return Path(ValidatorSettings.model_fields["scratch_folder"].get_default(call_default_factory=True))


def test_the_folder_lies_in_the_home_of_the_service_else_in_the_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    assert _default() == tmp_path / "validator"
    monkeypatch.delenv("TESSERA_HOME")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert _default().parent == tmp_path / "temporary"
