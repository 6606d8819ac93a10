"""`make bench-start`: how long a newcomer waits. Clones HEAD, then `make run` cold, `make run` warm, idle for a while, `make stop`.

Progress on stderr, one JSON line last on stdout. Cold means an empty clone with a state folder of its own, downloads
included; this user's caches of pip, uv and Maven are used as they are, and `caches` says how many there were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_SETTLING_SECONDS = 15.0
_IDLE_SECONDS = 20.0


def timed(folder: Path, *command: str) -> tuple[float, float, str]:
    """(wall seconds, CPU seconds of children, output). Raises CalledProcessError with the output on stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA")}
    before, started = os.times(), time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    after, wall = os.times(), time.monotonic() - started
    sys.stderr.write(f"{' '.join(command)}: {wall:.1f} s\n")
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
        done.check_returncode()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return round(wall, 1), round(cpu, 1), done.stdout


def tour_seconds(output: str) -> float | None:
    """What the tour itself said."""
    told = re.search(r"The tour took ([0-9.]+) s", output)
    return float(told.group(1)) if told else None


def idle_cores(clone: Path) -> float:
    """Processor time per second of everything that was started from a folder, servers among it, while nobody asks for anything. Blocks."""
    running = [process for process in psutil.process_iter() if _belongs(process, clone)]
    before = sum(_cpu_seconds(process) for process in running)
    time.sleep(_IDLE_SECONDS)
    return round((sum(_cpu_seconds(process) for process in running) - before) / _IDLE_SECONDS, 3)


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get("PWD", "").startswith(str(folder)) or any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def main() -> int:
    """The command line; returns the exit code."""
    caches = [
        str(path) for path in (Path.home() / ".cache/uv", Path.home() / ".m2/repository", Path.home() / ".cache/pip") if path.exists()
    ]
    folder = Path(tempfile.mkdtemp(prefix="tessera-bench-"))
    clone = folder / "clone"
    try:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        cold, cold_cpu, first = timed(clone, "make", "run")
        warm, warm_cpu, second = timed(clone, "make", "run")
        time.sleep(_SETTLING_SECONDS)
        idle = idle_cores(clone)
        sys.stderr.write(f"idle: {idle} cores\n")
        tour_cold, tour_warm = tour_seconds(first), tour_seconds(second)
    finally:
        subprocess.run(["make", "stop"], cwd=clone, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "cold_s": cold,
        "cold_without_tour_s": round(cold - (tour_cold or 0), 1),
        "cold_cpu_s": cold_cpu,
        "warm_s": warm,
        "warm_without_tour_s": round(warm - (tour_warm or 0), 1),
        "warm_cpu_s": warm_cpu,
        "tour_cold_s": tour_cold,
        "tour_warm_s": tour_warm,
        "idle_cores": idle,
        "caches": len(caches),
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()},
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
