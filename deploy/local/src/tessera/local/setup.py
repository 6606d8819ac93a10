"""`make setup`: the Python environment of the checkout, from locked and hashed packages. Standard library alone.

    PYTHONPATH=deploy/local/src python3 -m tessera.local.setup [--doctor]

Quick when nothing changed: a stamp in the environment names the lock file and the members that it was made from.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tessera.local.errors import LocalError
from tessera.local.files import locked
from tessera.local.folders import CHECKOUT, ENVIRONMENT, SETUP_LOCK, cache
from tessera.local.tools import KAFKA_NAMES, KAFKA_VERSION, java, maven, missing, python

UV_VERSION = "0.13.8"
_STAMP = ENVIRONMENT / "tessera-setup.sha256"
_LOCK = CHECKOUT / "requirements.lock"
_KAFKA_IN_FILE = re.compile(rf"^[ \t]*(?:export[ \t]+)?(?:{'|'.join(KAFKA_NAMES)})[ \t]*=[ \t]*([^\s#]+)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when the environment is ready (or, with --doctor, when the machine has all it needs), else 1."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return doctor() if "--doctor" in words else setup()
    except LocalError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; `make setup` continues where this stopped.\n")
        return 130


def doctor() -> int:
    """Say what is missing on this machine, one sentence each."""
    problems = list(missing(kafka_is_given=_kafka_is_given(), kafka_is_cached=_kafka_is_cached()))
    for problem in problems:
        sys.stdout.write(f"missing  {problem}\n")
    if not problems:
        found = [python()] if _kafka_is_given() else [python(), java(), *([] if _kafka_is_cached() else [maven()])]
        sys.stdout.write(f"Everything that is needed is here: {', '.join(found)}.\n")
    return 1 if problems else 0


def setup() -> int:
    """Make or renew the environment where the lock file or a member changed."""
    problems = list(missing(kafka_is_given=_kafka_is_given(), kafka_is_cached=_kafka_is_cached()))
    if problems:
        raise LocalError("\n".join(problems))
    wanted = fingerprint()
    if _is_made(wanted):
        return 0
    with locked(ENVIRONMENT.parent / SETUP_LOCK):
        if not _is_made(wanted):  # by whoever held the lock
            _make(wanted)
    return 0


def _is_made(wanted: str) -> bool:
    return _STAMP.exists() and _STAMP.read_text() == wanted


def _make(wanted: str) -> None:
    started = time.monotonic()
    sys.stdout.write(f"Setting up the Python environment in {ENVIRONMENT.relative_to(CHECKOUT)} (1.3 GB the first time)\n")
    sys.stdout.flush()
    _install(uv_program())
    _STAMP.write_text(wanted)
    sys.stdout.write(f"  environment ready in {time.monotonic() - started:.1f} s\n")


def fingerprint() -> str:
    """Of the lock file, the members' descriptions and the interpreter."""
    total = hashlib.sha256(sys.version.encode())
    for file in (_LOCK, *(member / "pyproject.toml" for member in members())):
        total.update(file.read_bytes() if file.exists() else b"")
    return total.hexdigest()


def members() -> list[Path]:
    """The folders of the workspace's members."""
    return [
        file.parent for pattern in ("libs/*", "services/*", "deploy/local") for file in sorted(CHECKOUT.glob(f"{pattern}/pyproject.toml"))
    ]


def _install(uv: str) -> None:
    interpreter = ENVIRONMENT / "bin" / "python"
    if not interpreter.exists():
        _run(uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(ENVIRONMENT))
    editable = [word for member in members() for word in ("--editable", str(member))]
    _run(uv, "pip", "sync", "--quiet", "--python", str(interpreter), "--require-hashes", str(_LOCK))
    _run(uv, "pip", "install", "--quiet", "--python", str(interpreter), "--no-deps", *editable)


def uv_program() -> str:
    """uv from the PATH, else fetched into the cache. Raises LocalError. Blocks."""
    private = cache() / "uv" / "bin" / "uv"
    found = shutil.which("uv") or (str(private) if private.exists() else None)
    if found is None:
        sys.stdout.write("  fetching uv\n")
        folder = private.parents[1]
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _run(sys.executable, "-m", "venv", str(folder))
        except LocalError as problem:
            raise LocalError("Python's venv module does not work here: install it (on Debian: python3-venv), or uv.") from problem
        _run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"uv=={UV_VERSION}")
    return found or str(private)


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise LocalError(f"`{' '.join(command[:4])} …` failed; its message stands above.")


def _kafka_is_given() -> bool:
    """In the environment or in `.env`, which is read here by hand: its library may not be installed yet."""
    file = CHECKOUT / ".env"
    written = _KAFKA_IN_FILE.findall(file.read_text()) if file.exists() else []
    return any(map(os.environ.get, KAFKA_NAMES)) or any(value.strip("'\"") for value in written)


def _kafka_is_cached() -> bool:
    return (cache() / f"kafka-{KAFKA_VERSION}" / "jars").exists()


if __name__ == "__main__":
    raise SystemExit(main())
