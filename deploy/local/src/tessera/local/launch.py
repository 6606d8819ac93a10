"""Become a server: take its lock, check its ports, tie its life to the parent's, drop root, exec.

    python -m tessera.local.launch --lock FILE --port N --record FILE --death-signal TERM --user nobody -- PROGRAM ARGUMENT…

Every server and service of the local stack starts through this, under supervisor as well as in tests. The process id stays the same from
here to the server, so that a signal to it reaches the server, and the record (process id and start time) identifies it after a crash.
"""

import argparse
import ctypes
import fcntl
import json
import os
import pwd
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tessera.local.files import replace_text
from tessera.local.identity import identity
from tessera.local.ports import is_free

EXIT_LOCKED = 75
EXIT_PORT_TAKEN = 76
EXIT_ORPHAN = 77
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Never returns: replaces this process, or exits with a message on stderr."""
    given = options(arguments)
    prepare(given)
    program = [*_as_user(given.user, given.death_signal, given.traverse), *given.program]
    os.execvp(program[0], program)  # noqa: S606  # nosec B606 - the caller names the program


def prepare(given: argparse.Namespace) -> None:
    """All but the change of user and of program. Exits with a message on stderr where that cannot be."""
    parent = os.getppid()
    if given.lock is not None:
        _lock(given.lock)
    for port in given.port:
        if not is_free(port):
            _refuse(f"port {port} is in use by another process", EXIT_PORT_TAKEN)
    if given.record is not None:
        record(given.record)
    _die_with_parent(parent, given.death_signal)
    if given.environment is not None:
        _set_environment(json.loads(given.environment.read_text()))
    os.chdir(given.cwd)


def record(file: Path) -> None:
    """Note this process so that `tessera.local.processes.recorded` finds it again."""
    replace_text(file, json.dumps(identity(os.getpid())))


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, read. Exits with a message on stderr where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tessera.local.launch")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--port", type=int, action="append", default=[])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--death-signal", type=lambda name: signal.Signals[f"SIG{name}"])
    parser.add_argument("--user")
    parser.add_argument("--traverse", action="store_true", help="let the user pass folders that only root may enter")
    parser.add_argument("--cwd", default=".")
    parser.add_argument("--environment", type=Path, help="JSON object of variables to set; keeps secrets out of the argument list")
    parser.add_argument("program", nargs="+")
    return parser.parse_args(arguments)


def _lock(file: Path) -> None:
    """Hold the lock until this process, whatever it becomes, ends: a second broker on the same data breaks the first."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _refuse(f"another process holds {file}", EXIT_LOCKED)


def _set_environment(variables: Mapping[str, str]) -> None:
    """Ours are exactly those given: what an earlier command's shell had set does not linger in supervisord's children."""
    for name in [name for name in os.environ if name.startswith("TESSERA_")]:
        del os.environ[name]
    os.environ.update(variables)


def _die_with_parent(parent: int, death_signal: signal.Signals | None) -> None:
    if death_signal is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != parent:
        _refuse("the parent is gone", EXIT_ORPHAN)


def _as_user(name: str | None, death_signal: signal.Signals | None, traverse: bool) -> list[str]:
    """The prefix that drops root. setpriv sets the death signal last, because a change of user clears it."""
    if name is None:
        return []
    user = pwd.getpwnam(name)
    prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    if death_signal is not None:
        prefix.append(f"--pdeathsig={death_signal.name}")
    if traverse:
        prefix += ["--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override", "--securebits=+no_setuid_fixup"]
    return [*prefix, "--"]


def _refuse(reason: str, code: int) -> None:
    sys.stderr.write(f"tessera.local.launch: {reason}\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
