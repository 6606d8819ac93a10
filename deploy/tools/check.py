"""`make check`: everything that can be said about the tree without running it. Prints each check with its time; exit 1 if one fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYTHON = sys.executable

CHECKS: dict[str, list[str]] = {
    "format": [f"{BIN}/ruff", "format", "--check", "--quiet", "."],
    "lint": [f"{BIN}/ruff", "check", "--quiet", "."],
    "imports": [f"{BIN}/lint-imports", "--no-logo", "--cache-dir", ".tessera/cache/import-linter"],
    "types": [f"{BIN}/mypy", *sorted(str(path) for path in (*ROOT.glob("*/*/src"), ROOT / "deploy/tools"))],
    "locks": [PYTHON, "deploy/tools/locks.py", "check"],
    "schemas": [PYTHON, "-m", "tessera.contracts.schemas", "check"],
    "documents": [PYTHON, "-m", "tessera.contracts.documents", "check"],
    "settings": [PYTHON, "deploy/tools/settings_example.py", "check"],
    "chart": [PYTHON, "deploy/tools/chart.py"],
    "compose": [f"{BIN}/check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"],
    "workflow": [f"{BIN}/check-jsonschema", "--builtin-schema", "vendor.github-workflows", ".github/workflows/ci.yml"],
    "dockerfile": [f"{BIN}/hadolint", "deploy/docker/Dockerfile"],
    "yaml": [f"{BIN}/yamllint", "--strict", "docker-compose.yml", "helm/tessera/values.yaml", "helm/tessera/ci", ".github"],
}


def run(name: str, command: list[str], folder: Path = ROOT) -> bool:
    """Run one check; its output only where it fails."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    passed = done.returncode == 0
    sys.stdout.write(f"{'ok  ' if passed else 'FAIL'} {name:<12} {time.monotonic() - started:5.1f} s\n")
    if not passed:
        sys.stdout.write(f"{done.stdout[-8000:]}{done.stderr[-8000:]}\n")
    sys.stdout.flush()
    return passed


def compose_parser() -> bool:
    """docker compose's own parser, where Go is there to build it; says loudly where it is not."""
    if not shutil.which("go"):
        sys.stdout.write("SKIPPED compose-go: no Go here, so docker-compose.yml was checked by its schema only\n")
        return True
    return run("compose-go", ["go", "run", ".", "../../../docker-compose.yml"], ROOT / "deploy/tools/compose-check")


def main() -> int:
    """The command line; returns the exit code."""
    passed = [run(name, command) for name, command in CHECKS.items()]
    passed.append(compose_parser())
    sys.stdout.write(f"{sum(passed)} of {len(passed)} checks passed\n")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
