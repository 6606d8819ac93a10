"""The spool's files behind an asynchronous face: group commit, limits, adoption, deletion (docs/hand-off.md)."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from tessera.bus import faults
from tessera.contracts.errors import RetryableError
from tessera.gateway.adapters.segments import Disk, Folder, Segment
from tessera.gateway.domain import spool
from tessera.gateway.domain.backlog import Place, Waiting, waiting_at
from tessera.gateway.domain.spool import AcceptedEvent, Recovery
from tessera.telemetry import get_logger, metrics

R = TypeVar("R")

SPOOLED_BEFORE_ANSWER = "spooled_before_answer"
"""Crash point: the event is on disk and the client does not know."""
HANDED_OVER_BEFORE_DELETE = "handed_over_before_delete"
"""Crash point: Kafka has the event and its record is still there."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class SpoolLimits:
    """What the spool may take."""

    maximum_bytes: int
    segment_bytes: int
    flush_interval: timedelta


@dataclass(frozen=True)
class _Write:
    payload: bytes
    place: asyncio.Future[Place]


class DiskSpool:
    """Implements `ports.SpoolStore`. For one event loop; the files are touched in one thread of its own, one step after the other."""

    def __init__(self, folder: Path, limits: SpoolLimits, disk: Disk | None = None) -> None:
        self._folder = Folder(folder, disk or Disk())
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._segments: dict[str, Segment] = {}
        self._active: Segment | None = None
        self._queue: list[_Write] = []
        self._queued_bytes = 0
        self.full = False
        self._committing: asyncio.Task[None] | None = None
        self._files = asyncio.Lock()

    @property
    def size_bytes(self) -> int:
        """Size of the segments that this process holds."""
        return sum(segment.size for segment in self._segments.values())

    async def open(self) -> None:
        """Makes the folder. Raises OSError where it cannot be used."""
        await self._do(self._folder.make)

    async def append(self, event: AcceptedEvent) -> Place:
        """Returns when the record is durable. Raises RetryableError `spool_full` or `spool_unwritable`; then it is not kept."""
        payload = spool.packed(event)
        size = spool.FRAME_BYTES + len(payload)
        if self.size_bytes + self._queued_bytes + size > self._limits.maximum_bytes:
            self.full = True
            metrics.SPOOL_REFUSED.labels(reason="full").inc()
            raise RetryableError("The spool is full.", code="spool_full")
        write = _Write(payload, asyncio.get_running_loop().create_future())
        self._queue.append(write)
        self._queued_bytes += size
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit())
        try:
            place = await write.place
        finally:
            self._queued_bytes -= size
        self.full = False
        metrics.SPOOL_KEPT.inc()
        faults.reach(SPOOLED_BEFORE_ANSWER)
        return place

    async def read(self, place: Place) -> AcceptedEvent:
        """The event at a place. Raises ValueError where the disk no longer gives back what was written, OSError where it fails."""
        segment = self._segments[place.segment]
        data = await self._do(partial(self._folder.read, segment, place.offset, place.length))
        return spool.read_frame(data, segment.sync)

    async def settle(self, place: Place, *, set_aside: bool = False) -> None:
        """The record is no longer needed; a segment without any goes. `set_aside` keeps its file for a person. Raises OSError."""
        faults.reach(HANDED_OVER_BEFORE_DELETE)
        async with self._files:
            segment = self._segments[place.segment]
            segment.waiting -= 1
            segment.set_aside |= set_aside
            await self._remove_if_done(segment)

    async def adopt(self) -> list[Waiting]:
        """Takes the segments that nobody holds, and tells what waits in them, oldest first. Raises OSError.

        One segment at a time, so that the content of no more than one is in memory.
        """
        found: list[Waiting] = []
        async with self._files:
            segments = self._folder.adopt(frozenset(self._segments))
            while adopted := await self._do(partial(next, segments, None)):
                segment, recovery, torn = adopted
                _tell(segment, recovery, torn)
                if segment.waiting:
                    self._segments[segment.name] = segment
                found += (waiting_at(Place(segment.name, frame.offset, frame.length), frame.event) for frame in recovery.frames)
        return found

    async def close(self) -> None:
        """Lets the segments go; others may adopt them. What is being written is finished."""
        if self._committing is not None:
            await asyncio.gather(self._committing, return_exceptions=True)
        async with self._files:
            for segment in self._segments.values():
                await self._do(partial(self._folder.release, segment))
            self._segments.clear()
            self._active = None
        self._thread.shutdown()

    # --- writing ---
    async def _commit(self) -> None:
        """Writes what waits, group by group: whoever comes while one is written shares the next one's fsync."""
        while self._queue:
            await asyncio.sleep(self._limits.flush_interval.total_seconds())
            async with self._files:
                group, self._queue = self._queue, []
                try:
                    places = await self._write([write.payload for write in group])
                except Exception as error:  # noqa: BLE001
                    # Whatever went wrong, those who wait must be told: their events are not on disk.
                    self._refuse(group, error)
                else:
                    for write, place in zip(group, places, strict=True):
                        _resolve(write.place, place)

    async def _write(self, payloads: list[bytes]) -> list[Place]:
        segment = await self._writable()
        frames = [spool.framed(segment.sync, payload) for payload in payloads]
        try:
            offsets = await self._do(partial(self._folder.append, segment, frames))
        except Exception:
            await self._remove_if_done(segment)
            raise
        segment.waiting += len(frames)
        return [Place(segment.name, offset, len(frame)) for offset, frame in zip(offsets, frames, strict=True)]

    async def _writable(self) -> Segment:
        active = self._active
        if active is None or not active.writable or active.size >= self._limits.segment_bytes:
            active = self._active = await self._do(self._folder.create)
            self._segments[active.name] = active
        return active

    async def _remove_if_done(self, segment: Segment) -> None:
        if segment.waiting:
            return
        await self._do(partial(self._folder.remove, segment))
        del self._segments[segment.name]
        self.full = False
        if self._active is segment:
            self._active = None

    def _refuse(self, group: list[_Write], error: Exception) -> None:
        self.full = True
        metrics.SPOOL_REFUSED.labels(reason="disk").inc(len(group))
        _log.error("the spool cannot write", error=repr(error), events=len(group), exc_info=not isinstance(error, OSError))
        for write in group:
            _resolve(write.place, RetryableError(f"The spool cannot write: {error}.", code="spool_unwritable"))

    async def _do(self, step: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, step)


def _resolve(waiting: asyncio.Future[Place], outcome: Place | RetryableError) -> None:
    if waiting.done():
        return
    if isinstance(outcome, RetryableError):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)


def _tell(segment: Segment, recovery: Recovery, torn: int) -> None:
    _log.info("segment adopted", segment=segment.name, events=len(recovery.frames))
    if torn:
        _log.warning("a torn record at the end of a segment was cut off", segment=segment.name, bytes=torn)
    if recovery.damaged:
        metrics.SPOOL_DAMAGED.inc(len(recovery.damaged))
        _log.error("a segment is damaged; it will be set aside", segment=segment.name, parts=len(recovery.damaged))
