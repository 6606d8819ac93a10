"""What every benchmark needs: processor time by process, percentiles, and what the machine was doing."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import psutil


def progress(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def print_figures(figures: dict[str, Any]) -> None:
    """The one JSON line on stdout; call it last."""
    sys.stdout.write(json.dumps(figures) + "\n")


def machine() -> dict[str, Any]:
    """Cores, and load over 1, 5 and 15 minutes."""
    return {"cores": os.cpu_count(), "load": [round(load, 2) for load in os.getloadavg()]}


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; `share` from 0 to 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(values: Sequence[float], share: float) -> float:
    """A percentile of seconds, in milliseconds."""
    return round(1000 * percentile(values, share), 2)


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes and their descendants, so far; of one that has ended, where its parent waited for it."""
    total = 0.0
    for pid in pids:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass
class Stopwatch:
    """Wall and processor time between entering and leaving the block, over the processes named and the children of each."""

    pids: tuple[int, ...]
    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Self:
        self.wall, self.cpu = time.monotonic(), cpu_seconds(self.pids)
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.monotonic() - self.wall, cpu_seconds(self.pids) - self.cpu
