"""Free loopback ports, chosen once and remembered."""

import contextlib
import json
import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from tessera.local.errors import PortTakenError
from tessera.local.files import replace_text

LOOPBACK = "127.0.0.1"
# Below the kernel's range for outgoing connections (from 32768 on Linux): no client socket takes a port between choosing and using it.
CHOICE = range(18000, 32000)
_ATTEMPTS = 500


def is_free(port: int) -> bool:
    """Whether a server could listen on the loopback port now. Does not block."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return True
    return False


def accepts_connections(address: str, timeout_seconds: float = 1) -> bool:
    """Whether something listens at `host:port`. Blocks, at most for the time-out."""
    host, _, port = address.strip().rpartition(":")
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host.strip("[]"), int(port)), timeout_seconds):
        return True
    return False


def free_port(taken: Iterable[int] = ()) -> int:
    """A port that is free now and not in `taken`; raises PortTakenError when none is found."""
    excluded = set(taken)
    for _ in range(_ATTEMPTS):
        port = random.choice(CHOICE)  # noqa: S311  # nosec B311 - no secret
        if port not in excluded and is_free(port):
            return port
    raise PortTakenError(f"No free port between {CHOICE.start} and {CHOICE.stop} was found.")


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """A different free port for every name."""
    chosen: dict[str, int] = {}
    for name in names:
        chosen[name] = free_port(chosen.values())
    return chosen


def remembered_ports(
    file: Path, names: Iterable[str], in_use_by_us: Iterable[str] = (), spoken_for: Iterable[int] = ()
) -> Mapping[str, int]:
    """The ports kept in `file`, completed with free ones that are not `spoken_for`, and written back.

    A remembered port that somebody else has taken is replaced; names in `in_use_by_us` keep theirs although they are busy.
    """
    known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    ours = set(in_use_by_us)
    chosen = {name: port for name, port in known.items() if name in ours or is_free(port)}
    for name in names:
        if name not in chosen:
            chosen[name] = free_port([*chosen.values(), *known.values(), *spoken_for])
    if chosen != known:
        replace_text(file, json.dumps(chosen, indent=2) + "\n")
    return chosen
