"""The load and the fake provider: a program in Go, so that what is measured is not what measures."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import milliseconds
from programs import Program

from tessera.local.folders import cache
from tessera.local.ports import LOOPBACK, accepts_connections

_SOURCES = Path(__file__).with_name("instrument")


def instrument() -> Path:
    """The program, built once for each version of its source."""
    sources = [*sorted(_SOURCES.glob("*.go")), _SOURCES / "go.mod"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    built = cache() / "bench" / f"instrument-{digest}"
    if not built.exists():
        if shutil.which("go") is None:
            sys.exit("Go 1.22 or newer is missing: the load generator is written in it (on Debian 13: golang-go; or from go.dev).")
        built.parent.mkdir(parents=True, exist_ok=True)
        scratch = built.with_suffix(f".{os.getpid()}")
        subprocess.run(["go", "build", "-o", str(scratch), "."], cwd=_SOURCES, check=True, env={**os.environ, "GOTOOLCHAIN": "local"})
        scratch.rename(built)
    return built


class Upstream(Program):
    """The fake provider: 20 ms to the first token. Model `bench` has a token every 5 ms, `steady` every 50."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port, (str(instrument()), "upstream", "-listen", f"{LOOPBACK}:{port}"))

    def answers(self) -> bool:
        """Whether it listens."""
        return accepts_connections(self.address)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{LOOPBACK}:{self.port}"


@dataclass(frozen=True)
class Load:
    """Chats that are begun at fixed moments, whatever becomes of those before."""

    rate: float
    seconds: float
    model: str = "bench"
    tokens: int = 20
    gaps: tuple[float, float] = (0, 0)
    """Between which seconds the gaps between the events of a stream count."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the body."""
    patience_seconds: float = 30

    def started(self, url: str, key: str) -> "subprocess.Popen[str]":
        """Runs, and prints what became of it."""
        options = {
            "url": url,
            "key": key,
            "rate": self.rate,
            "seconds": self.seconds,
            "model": self.model,
            "tokens": self.tokens,
            "gaps-from": self.gaps[0],
            "gaps-until": self.gaps[1],
            "extra": json.dumps(self.extra),
            "patience": f"{self.patience_seconds}s",
        }
        words = [word for name, value in options.items() for word in (f"-{name}", str(value))]
        return subprocess.Popen([str(instrument()), "load", *words], stdout=subprocess.PIPE, text=True)


@dataclass(frozen=True)
class Answers:
    """What became of a load. Times are in seconds from the moment a request was due; of those only that ended as they should."""

    sent: int
    errors: dict[str, int]
    first: Sequence[float]
    """To the first token."""
    whole: Sequence[float]
    """To the end of the stream."""
    gaps: Sequence[float]

    @property
    def error_rate(self) -> float:
        """Of everything that was sent."""
        return sum(self.errors.values()) / self.sent

    def gap_p99_ms(self) -> float:
        """Between two events of a stream."""
        return milliseconds(self.gaps, 0.99)


def finished(loading: "subprocess.Popen[str]") -> Answers:
    """Waits for a load. Blocks; ended with this process."""
    try:
        told, _ = loading.communicate()
    finally:
        if loading.poll() is None:
            loading.send_signal(signal.SIGTERM)
            loading.wait(10)
    if loading.returncode:
        raise RuntimeError(f"the load ended with {loading.returncode}")
    report = json.loads(told)
    return Answers(report["sent"], report["errors"], report["first"], report["whole"], report["gaps"])
