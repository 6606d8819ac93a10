"""Who a process is: its id, and when it started, told apart from another process that was given the same id later.

On Linux the moment is counted since the boot. A moment of the wall clock would not do: the clock is set while processes run (after a
suspension, by NTP), and whoever computes a start from it then takes a living process for a dead one.
"""

from pathlib import Path

import psutil

_SAME_START_SECONDS = 2.0
_STARTED_FIELD = 22  # of /proc/[pid]/stat, see proc(5)

Identity = dict[str, int | float | str]


def identity(pid: int) -> Identity:
    """What is to be noted about a process, to recognise it later. Raises OSError or psutil.NoSuchProcess when there is none."""
    if not Path("/proc/self/stat").exists():
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    # The name of the program, in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return {"pid": pid, "boot": boot, "ticks": int(fields[_STARTED_FIELD - 3])}


def is_same(noted: Identity) -> bool:
    """Whether the process that was noted lives. Raises KeyError where nothing was, OSError or psutil.NoSuchProcess when it ended."""
    if "ticks" in noted:
        return identity(int(noted["pid"])) == noted
    return abs(psutil.Process(int(noted["pid"])).create_time() - float(noted["started"])) < _SAME_START_SECONDS
