"""Runs the steps of the Dockerfile in plain root file systems, for machines without a container engine.

    sudo python deploy/tools/image_steps.py memory ROOT [FOLDER]

ROOT is a Debian root file system with Python, such as
`debootstrap --include=python3.11,python3.11-venv,python3-pip,ca-certificates bookworm ROOT` makes. Each stage works on a copy of it below
FOLDER (default: a temporary one) and runs its ARG, ENV, WORKDIR, COPY and RUN; at the end the image's program is looked for as its user.
That the base images themselves can be pulled is not shown by this.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


@dataclass
class Stage:
    """One stage: its root file system and what has been set so far."""

    name: str
    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entry: list[str] = field(default_factory=list)

    def run(self, command: list[str], user: str = "0:0") -> None:
        """Run a command inside, as Docker would."""
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_") and name != "PIP_FIND_LINKS"}
        environment = {"PATH": path, "HOME": "/tmp", **passed, **self.variables}  # noqa: S108 - inside the image
        inside = ["chroot", f"--userspec={user}", str(self.root), "/bin/sh", "-c", f"cd {self.folder} && exec {shlex.join(command)}"]
        subprocess.run(inside, check=True, env=environment)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(keyword, arguments), continued lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, arguments = line.strip().partition(" ")
            yield keyword.upper(), arguments.strip()


def build(service: str, base: Path, work: Path) -> Stage:
    """Run every stage; the last one. Raises CalledProcessError for a step that fails."""
    stages: dict[str, Stage] = {}
    stage = Stage("", base)
    for keyword, arguments in instructions((CHECKOUT / "deploy/docker/Dockerfile").read_text(encoding="utf-8")):
        if keyword == "FROM":
            stage = _new_stage(arguments, base, work)
            stages[stage.name] = stage
        elif stage.name:
            sys.stdout.write(f"[{stage.name}] {keyword} {arguments[:110]}\n")
            sys.stdout.flush()
            _apply(stage, stages, keyword, _expanded(arguments, {**stage.variables, "SERVICE": service}), service)
    return stage


def _new_stage(arguments: str, base: Path, work: Path) -> Stage:
    name = arguments.split(" AS ")[1]
    root = work / name
    subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(root)], check=True)
    python = root / "usr/local/bin/python"
    if not python.exists():
        python.symlink_to("/usr/bin/python3")
    for known in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):
        shutil.copy(known, root / known.lstrip("/"))
    return Stage(name, root)


def _apply(stage: Stage, stages: dict[str, Stage], keyword: str, arguments: str, service: str) -> None:
    match keyword:
        case "ARG":
            stage.variables["SERVICE"] = service
        case "ENV":
            stage.variables |= dict(pair.split("=", 1) for pair in shlex.split(arguments))
        case "WORKDIR":
            stage.folder = arguments
            (stage.root / arguments.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = arguments
        case "ENTRYPOINT":
            stage.entry = json.loads(arguments)
        case "RUN":
            stage.run(["/bin/sh", "-c", arguments])
        case "COPY":
            _copy(stage, stages, shlex.split(arguments))


def _copy(stage: Stage, stages: dict[str, Stage], arguments: list[str]) -> None:
    origin = CHECKOUT
    if arguments[0].startswith("--from="):
        origin = stages[arguments.pop(0).removeprefix("--from=")].root
    source = origin / arguments[0].lstrip("/")
    target = stage.root / (arguments[1] if arguments[1].startswith("/") else f"{stage.folder}/{arguments[1]}").lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "tests") if origin == CHECKOUT else None
        shutil.copytree(source, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _expanded(text: str, variables: dict[str, str]) -> str:
    """Docker expands its own variables; the shell's stay for the shell."""
    for name in ("SERVICE", "PATH"):
        text = text.replace(f"${{{name}}}", variables.get(name, f"${{{name}}}"))
    return text.replace("$PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    service, base = arguments[0], Path(arguments[1]).resolve()
    work = Path(arguments[2]) if len(arguments) > 2 else Path(tempfile.mkdtemp(prefix="tessera-image-"))
    try:
        stage = build(service, base, work)
        said = [
            "/bin/sh",
            "-c",
            f"id -u && python -c 'import tessera.{service}.app; print(tessera.{service}.app.__file__)' && command -v tessera-{service}",
        ]
        stage.run(said, user=stage.user)
        sys.stdout.write(f"{service}: every step ran; the entry point {stage.entry} is there for user {stage.user}\n")
    finally:
        if len(arguments) <= 2:
            shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
