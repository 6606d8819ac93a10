"""The spool's files on a real file system: durable before it says so, shared by processes, whole after a crash."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tessera.contracts.errors import RetryableError
from tessera.gateway.adapters.segments import Disk
from tessera.gateway.adapters.spool import DiskSpool, SpoolLimits
from tessera.gateway.domain.backlog import Place
from tessera.gateway.domain.spool import AcceptedEvent

pytestmark = pytest.mark.unit

MEBIBYTE = 1024 * 1024
LIMITS = SpoolLimits(MEBIBYTE, 64 * 1024, timedelta(0))
Opener = Callable[..., "asyncio.Future[DiskSpool]"]


def event(name: str, size: int = 2) -> AcceptedEvent:
    return AcceptedEvent(name, "acme", "ingest.acme", b"key", (("ce_id", name.encode()),), b"x" * size, datetime.now(UTC))


class Watched(Disk):
    """A disk that notes what it does, and can wait or fail."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.fails: Exception | None = None
        self.fails_at = "write"
        self.synced: dict[int, int] = {}

    def write(self, descriptor: int, data: bytes) -> None:
        self.steps.append("write")
        if self.fails is not None and self.fails_at == "write":
            os.write(descriptor, data[: len(data) // 2])
            raise self.fails
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        if self.fails is not None:
            raise self.fails
        super().sync(descriptor)
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = status.st_size
        self.steps.append("sync")


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    async with AsyncExitStack() as closing:

        async def open_spool(limits: SpoolLimits = LIMITS, disk: Disk | None = None) -> DiskSpool:
            spool = DiskSpool(tmp_path / "spool", limits, disk)
            await spool.open()
            closing.push_async_callback(spool.close)
            return spool

        yield open_spool


def files(tmp_path: Path, suffix: str = ".spool") -> list[Path]:
    return sorted((tmp_path / "spool").glob(f"*{suffix}"))


def die(spool: DiskSpool) -> None:
    """What the kernel does to the locks of a process that is killed."""
    for segment in spool._segments.values():
        os.close(segment.descriptor)
    spool._segments.clear()
    spool._active = None


async def test_a_record_is_synced_before_append_returns(opened: Callable[..., object], tmp_path: Path) -> None:
    disk = Watched()
    spool: DiskSpool = await opened(disk=disk)  # type: ignore[misc]
    for number in range(3):
        place = await spool.append(event(f"e-{number}"))
        (file,) = files(tmp_path)
        assert disk.synced[file.stat().st_ino] >= place.offset + place.length
    assert disk.steps == ["write", "sync", "sync", *["write", "sync"] * 3], "header, file and folder; then each record"


async def test_those_who_wait_together_share_one_sync(opened: Callable[..., object]) -> None:
    disk = Watched()
    spool: DiskSpool = await opened(disk=disk)  # type: ignore[misc]
    await spool.append(event("first"))
    before = disk.steps.count("sync")
    places = await asyncio.gather(*(spool.append(event(f"e-{number}")) for number in range(50)))
    assert disk.steps.count("sync") == before + 1
    assert places == sorted(places)
    assert [(await spool.read(place)).event_id for place in places] == [f"e-{number}" for number in range(50)]


async def test_a_segment_goes_when_its_last_record_is_settled(opened: Callable[..., object], tmp_path: Path) -> None:
    spool: DiskSpool = await opened(SpoolLimits(MEBIBYTE, 4_096, timedelta(0)))  # type: ignore[misc]
    places = [await spool.append(event(f"e-{number}", 3_000)) for number in range(6)]
    assert len(files(tmp_path)) == 3
    for place in places[1:]:
        await spool.settle(place)
    assert [file.stem for file in files(tmp_path)] == [places[0].segment]
    await spool.settle(places[0])
    assert (files(tmp_path), spool.size_bytes) == ([], 0)


async def test_what_is_full_refuses_and_keeps_nothing_of_it(opened: Callable[..., object]) -> None:
    spool: DiskSpool = await opened(SpoolLimits(10_000, 10_000, timedelta(0)))  # type: ignore[misc]
    outcomes = await asyncio.gather(*(spool.append(event(f"e-{number}", 3_000)) for number in range(5)), return_exceptions=True)
    kept = [place for place in outcomes if isinstance(place, Place)]
    refused = [error.code for error in outcomes if isinstance(error, RetryableError)]
    assert (len(kept), refused, spool.size_bytes <= 10_000) == (3, ["spool_full"] * 2, True)
    with pytest.raises(RetryableError, match="full"):
        await spool.append(event("too much", 3_000))
    assert spool.full
    for place in kept:
        await spool.settle(place)
    assert not spool.full
    await spool.append(event("again", 3_000))


@pytest.mark.parametrize("fails_at", ["write", "sync"])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left, says a bug")])
async def test_a_disk_that_fails_refuses_and_leaves_nothing_behind(
    opened: Callable[..., object], tmp_path: Path, fails_at: str, fault: Exception
) -> None:
    disk = Watched()
    disk.fails_at = fails_at
    spool: DiskSpool = await opened(disk=disk)  # type: ignore[misc]
    kept = await spool.append(event("before"))
    disk.fails = fault
    for _ in range(2):
        with pytest.raises(RetryableError, match="No space left") as refused:
            await spool.append(event("refused"))
        assert refused.value.code == "spool_unwritable"
    assert spool.full
    disk.fails = None
    after = await spool.append(event("after"))
    assert (spool.full, [file.stem for file in files(tmp_path)]) == (False, [kept.segment, after.segment])
    die(spool)
    adopted = await (await opened()).adopt()  # type: ignore[misc]
    assert [found.event_id for found in adopted] == ["before", "after"]


async def test_another_process_adopts_only_what_nobody_holds(opened: Callable[..., object], tmp_path: Path) -> None:
    dead, alive, third = [await opened() for _ in range(3)]  # type: ignore[misc]
    left = await dead.append(event("left"))
    held = await alive.append(event("held"))
    assert (await third.adopt(), await third.adopt()) == ([], [])
    die(dead)
    (found,) = await third.adopt()
    assert (found.place, found.event_id, (await third.read(found.place)).event_id) == (left, "left", "left")
    assert await alive.adopt() == []
    await third.settle(found.place)
    assert [file.stem for file in files(tmp_path)] == [held.segment]


async def test_a_closed_spool_lets_its_segments_go(opened: Callable[..., object]) -> None:
    first: DiskSpool = await opened()  # type: ignore[misc]
    place = await first.append(event("a"))
    await first.close()
    assert [found.place for found in await (await opened()).adopt()] == [place]  # type: ignore[misc]


async def test_a_torn_end_is_cut_off(opened: Callable[..., object], tmp_path: Path) -> None:
    spool: DiskSpool = await opened()  # type: ignore[misc]
    whole = await spool.append(event("whole"))
    torn = await spool.append(event("torn"))
    die(spool)
    (file,) = files(tmp_path)
    os.truncate(file, torn.offset + torn.length - 1)
    adopted = await (await opened()).adopt()  # type: ignore[misc]
    assert [(found.place, found.event_id) for found in adopted] == [(whole, "whole")]
    assert file.stat().st_size == whole.offset + whole.length


@pytest.mark.parametrize("length", [0, 5, 26])
async def test_a_segment_without_a_record_is_deleted(opened: Callable[..., object], tmp_path: Path, length: int) -> None:
    spool: DiskSpool = await opened()  # type: ignore[misc]
    await spool.append(event("a"))
    die(spool)
    (file,) = files(tmp_path)
    os.truncate(file, length)
    assert (await (await opened()).adopt(), files(tmp_path)) == ([], [])  # type: ignore[misc]


async def test_a_damaged_record_is_set_aside_with_its_file_and_the_rest_goes_on(opened: Callable[..., object], tmp_path: Path) -> None:
    spool: DiskSpool = await opened()  # type: ignore[misc]
    places = [await spool.append(event(f"e-{number}")) for number in range(3)]
    die(spool)
    (file,) = files(tmp_path)
    with file.open("r+b") as writing:
        writing.seek(places[1].offset + 40)
        writing.write(b"\xff\xff")
    adopter: DiskSpool = await opened()  # type: ignore[misc]
    adopted = await adopter.adopt()
    assert [found.event_id for found in adopted] == ["e-0", "e-2"]
    for found in adopted:
        await adopter.settle(found.place)
    assert (files(tmp_path), [found.stem for found in files(tmp_path, ".damaged")]) == ([], [file.stem])
    assert await adopter.adopt() == []


async def test_a_file_that_is_no_segment_is_set_aside(opened: Callable[..., object], tmp_path: Path) -> None:
    spool: DiskSpool = await opened()  # type: ignore[misc]
    (tmp_path / "spool" / "stranger.spool").write_bytes(b"what is this?" * 10)
    assert await spool.adopt() == []
    assert [found.name for found in files(tmp_path, ".damaged")] == ["stranger.damaged"]


async def test_a_record_that_decays_under_our_hands_is_not_read(opened: Callable[..., object], tmp_path: Path) -> None:
    spool: DiskSpool = await opened()  # type: ignore[misc]
    place = await spool.append(event("a"))
    (file,) = files(tmp_path)
    os.truncate(file, place.offset + 3)
    with pytest.raises(ValueError, match="broken"):
        await spool.read(place)
    await spool.settle(place, set_aside=True)
    assert len(files(tmp_path, ".damaged")) == 1


async def test_a_segment_that_cannot_be_read_does_not_hide_the_others(
    opened: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = [await opened() for _ in range(2)]  # type: ignore[misc]
    bad, good = await left.append(event("bad")), await right.append(event("good"))
    die(left)
    die(right)
    reading = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.stem == bad.segment:
            raise OSError(errno.EIO, "Input/output error")
        return reading(path)

    adopter: DiskSpool = await opened()  # type: ignore[misc]
    (tmp_path / "spool" / "a-folder.spool").mkdir()
    monkeypatch.setattr(Path, "read_bytes", read)
    assert [found.place for found in await adopter.adopt()] == [good]
    monkeypatch.undo()
    assert [found.place for found in await adopter.adopt()] == [bad]


async def test_folder_and_files_are_for_this_user_alone(opened: Callable[..., object], tmp_path: Path) -> None:
    await (await opened()).append(event("a"))  # type: ignore[misc]
    assert [(path.stat().st_mode & 0o777) for path in (tmp_path / "spool", *files(tmp_path))] == [0o700, 0o600]
