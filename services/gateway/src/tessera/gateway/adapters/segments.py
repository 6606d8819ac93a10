"""Segment files: made, locked, appended to, read, deleted. Everything here blocks: the spool calls it from a thread of its own.

A lock (flock, on the open file) is the claim to a segment. The kernel gives it back when the process dies, however it dies.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tessera.contracts.ids import uuid7
from tessera.gateway.domain import spool
from tessera.gateway.domain.spool import Recovery
from tessera.telemetry import get_logger

SUFFIX: Final = ".spool"
DAMAGED: Final = ".damaged"

_log = get_logger(__name__)


class Disk:
    """The calls that make bytes durable; tests put their own in place."""

    def write(self, descriptor: int, data: bytes) -> None:
        """Appends all of `data`. Raises OSError; then a part of it may be there."""
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]

    def sync(self, descriptor: int) -> None:
        """Returns when the file's bytes survive a loss of power. Raises OSError."""
        os.fsync(descriptor)


@dataclass
class Segment:
    """One file that this process holds the lock of."""

    path: Path
    descriptor: int
    sync: bytes
    size: int
    waiting: int = 0
    """Records in it that are not handed over yet."""
    set_aside: bool = False
    """It holds something that a person should see: renamed instead of deleted."""
    writable: bool = True

    @property
    def name(self) -> str:
        """Names sort by age."""
        return self.path.stem


class Folder:
    """The folder of the segments; other processes may use it too. Raises OSError where the file system does."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._disk = disk

    def make(self) -> None:
        """The folder, for this user alone."""
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self) -> Segment:
        """A new segment, locked and durable. An adopter that comes between its making and its locking deletes it: then another is made."""
        sync = secrets.token_bytes(spool.SYNC_BYTES)
        while True:
            path = self._path / f"{uuid7().hex}{SUFFIX}"
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(path, descriptor):
                break
            os.close(descriptor)
        try:
            self._disk.write(descriptor, spool.header(sync))
            self._disk.sync(descriptor)
            self._sync_folder()
        except Exception:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return Segment(path, descriptor, sync, spool.HEADER_BYTES)

    def append(self, segment: Segment, frames: Sequence[bytes]) -> list[int]:
        """The offsets of the frames, once all of them are durable.

        When that fails the segment is as it was before; where even this cannot be had, it is not written to again.
        """
        before = segment.size
        try:
            self._disk.write(segment.descriptor, b"".join(frames))
            self._disk.sync(segment.descriptor)
        except Exception:
            segment.writable = False  # after a failed fsync nobody knows what the file holds
            with suppress(OSError):
                os.ftruncate(segment.descriptor, before)
            raise
        offsets = []
        for frame in frames:
            offsets.append(segment.size)
            segment.size += len(frame)
        return offsets

    def read(self, segment: Segment, offset: int, length: int) -> bytes:
        """A piece of a segment."""
        return os.pread(segment.descriptor, length, offset)

    def adopt(self, own: frozenset[str]) -> Iterator[tuple[Segment, Recovery, int]]:
        """Segments that nobody holds, oldest first, each now locked and without its torn end, of which the length is told.

        Empty ones are deleted.
        """
        for path in sorted(self._path.glob(f"*{SUFFIX}")):
            if path.stem in own:
                continue
            try:
                found = self._adopted(path)
            except OSError as error:
                _log.error("a segment cannot be read and stays where it is", segment=path.name, error=repr(error))
                continue
            if found is not None:
                yield found

    def remove(self, segment: Segment) -> None:
        """Deletes a segment, or sets it aside. A crash in between leaves it for the next adopter: its records are sent again."""
        if segment.set_aside:
            segment.path.rename(segment.path.with_suffix(DAMAGED))
        else:
            segment.path.unlink(missing_ok=True)
        os.close(segment.descriptor)

    def release(self, segment: Segment) -> None:
        """Gives the claim up."""
        os.close(segment.descriptor)

    def _adopted(self, path: Path) -> tuple[Segment, Recovery, int] | None:
        descriptor = _locked(path)
        if descriptor is None:
            return None
        try:
            return self._recovered(path, descriptor)
        except OSError:
            os.close(descriptor)
            raise

    def _recovered(self, path: Path, descriptor: int) -> tuple[Segment, Recovery, int] | None:
        data = path.read_bytes()
        recovery = spool.recover(data)
        if recovery.end < len(data):
            os.ftruncate(descriptor, recovery.end)
        sync = data[len(spool.MAGIC) : spool.HEADER_BYTES]
        segment = Segment(path, descriptor, sync, recovery.end, len(recovery.frames), bool(recovery.damaged), writable=False)
        if not recovery.frames:
            self.remove(segment)
            return None if not (recovery.damaged or len(data) > spool.HEADER_BYTES) else (segment, recovery, len(data) - recovery.end)
        return segment, recovery, len(data) - recovery.end

    def _sync_folder(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._disk.sync(descriptor)
        finally:
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """The open file, locked; None where another process holds it or has just deleted it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    claimed = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claimed = _is_at(path, descriptor)
    except BlockingIOError:
        return None
    finally:
        if not claimed:
            os.close(descriptor)
    return descriptor if claimed else None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still has this name: it may have been deleted or set aside before it could be locked."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
