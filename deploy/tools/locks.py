"""The hashed lock files that are committed: versions and hashes, no registry.

    python deploy/tools/locks.py write [UV]    resolves with uv (that of the environment) and writes every lock
    python deploy/tools/locks.py check         exit 1 where one is stale, unhashed or names a host; needs no network

`requirements.lock` holds everything that development needs; each service, the client and the testkit have one of their
own, for their image and for testing them alone; `deploy/docker/build.lock` builds wheels. Each begins with a hash of
all dependency tables of the workspace. The locks of what lives in an environment of its own, because it wants other versions of the
same packages (clients of other make, and the proxy that the gateway is measured beside), begin with a hash of the `.in` beside them.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tessera.local.setup import uv_program

ROOT = Path(__file__).parents[2]
_HEADER = "# dependency tables: sha256 "
_MEMBERS = ("services/*", "libs/client", "libs/testkit")
_APART = (ROOT / "tests/e2e/clients/requirements.lock", ROOT / "tests/bench/gateway/litellm.lock")
_HOST = re.compile(r"https?://|--index-url|--extra-index-url|--find-links")


def dependency_digest() -> str:
    """A hash of what every pyproject.toml asks for."""
    tables = {}
    for path in sorted((ROOT / "pyproject.toml", *ROOT.glob("*/*/pyproject.toml"))):
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        project = document.get("project", {})
        asked = (project.get("dependencies"), project.get("optional-dependencies"), document.get("dependency-groups"))
        tables[path.relative_to(ROOT).as_posix()] = [*asked, document.get("tool", {}).get("uv")]
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def lock_files() -> dict[Path, list[str]]:
    """Every committed lock and what uv exports into it."""
    members = sorted(path for pattern in _MEMBERS for path in ROOT.glob(pattern) if (path / "pyproject.toml").exists())
    return {
        ROOT / "requirements.lock": ["--all-packages", "--all-groups"],
        ROOT / "deploy/docker/build.lock": ["--only-group", "build"],
        **{path / "requirements.lock": ["--package", f"tessera-{path.name}", "--no-default-groups"] for path in members},
    }


def write(uv: str) -> None:
    """Resolve and write every lock. Needs a network."""
    subprocess.run([uv, "lock", "--quiet"], cwd=ROOT, check=True)
    for path, scope in lock_files().items():
        command = [uv, "export", "--quiet", "--format", "requirements-txt", "--no-emit-workspace", "--no-header", "--no-annotate", *scope]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        path.write_text(f"{_HEADER}{dependency_digest()}\n{done.stdout}", encoding="utf-8")
    command = [
        uv,
        "pip",
        "compile",
        "--quiet",
        "--universal",
        "--python-version",
        "3.11",
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
    ]
    for path in _APART:
        done = subprocess.run([*command, str(path.with_suffix(".in"))], check=True, capture_output=True, text=True)
        path.write_text(f"{_HEADER}{_asked_digest(path)}\n{done.stdout}", encoding="utf-8")


def _asked_digest(path: Path) -> str:
    return hashlib.sha256(path.with_suffix(".in").read_bytes()).hexdigest()


def problems() -> list[str]:
    """What is wrong with the committed locks, one sentence each."""
    found = []
    for path, digest in {**dict.fromkeys(lock_files(), dependency_digest()), **{path: _asked_digest(path) for path in _APART}}.items():
        name = path.relative_to(ROOT)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text.startswith(f"{_HEADER}{digest}\n"):
            found.append(f"{name} is stale or missing: run `make lock`")
        if _HOST.search(text):
            found.append(f"{name} names a host")
        found.extend(f"{name}: {line} has no hash" for line in _unhashed(text))
    return found


def _unhashed(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line.split()[0] for line in joined.splitlines() if "==" in line and not line.startswith("#") and "--hash=" not in line]


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if arguments[:1] == ["write"]:
        write(arguments[1] if len(arguments) > 1 else uv_program())
    found = problems()
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
