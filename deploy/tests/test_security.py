"""The scan for secrets finds a new one, knows one that was looked at wherever it stands in its file, and changes nothing."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
KNOWN = 'TOKEN = "0af7651916cd43dd8448eb211c80319c"\n'  # pragma: allowlist secret - an example


@pytest.fixture
def security(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in a small repository with one secret that was looked at."""
    specification = importlib.util.spec_from_file_location("security", ROOT / "deploy/tools/security.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / "code.py").write_text(KNOWN)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "code.py"], cwd=tmp_path, check=True)
    scan = subprocess.run([f"{module.BIN}/detect-secrets", "scan"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / ".secrets.baseline").write_text(scan.stdout)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_a_known_secret_that_moved_is_still_known(security: ModuleType, tmp_path: Path) -> None:
    before = (tmp_path / ".secrets.baseline").read_text()
    (tmp_path / "code.py").write_text("# one\n# two\n" + KNOWN)
    assert security.secrets()
    assert (tmp_path / ".secrets.baseline").read_text() == before


def test_a_new_secret_is_found(security: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text(KNOWN + KNOWN.replace("0af7", "1bf8"))
    assert not security.secrets()
    assert "code.py:2" in capsys.readouterr().out
