"""The folder of one process for files that are gone with it, and an end to what a killed process left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PREFIX: Final = "process-"
_LOCK: Final = "in-use"


class ScratchFolder:
    """A folder below `parent` that is this process's own while it lives. The kernel drops its lock with the process, however that ends."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def take(cls, parent: Path) -> ScratchFolder:
        """Makes a folder after deleting those that no process holds. Raises OSError where that is not possible. Blocks."""
        parent = parent.absolute()
        parent.mkdir(parents=True, exist_ok=True)
        with _alone(parent):  # else another's folder could be swept between its making and its locking
            for leftover in parent.glob(f"{_PREFIX}*"):
                if not _is_held(leftover):
                    shutil.rmtree(leftover, ignore_errors=True)
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)  # no file object: one that is forgotten is closed, and unlocked
            fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def release(self) -> None:
        """Deletes the folder. Blocks."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    with (parent / "sweeping").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_held(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # died before it had a lock
        return False
    return False
