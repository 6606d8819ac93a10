"""Large objects by key: datasets, archives, reports."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Concatenate, ParamSpec, TypeVar
from uuid import uuid4

import fsspec
from fsspec.core import url_to_fs

from tessera.contracts.errors import InvalidError
from tessera.resilience import Breaker
from tessera.storage.errors import ObjectNotFoundError, ObjectsUnavailableError
from tessera.storage.settings import ObjectStoreSettings

P = ParamSpec("P")
R = TypeVar("R")

_KEY = re.compile(r"(?!\.{1,2}(/|$))[A-Za-z0-9._=@+-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9._=@+-]+)*")
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class ObjectStat:
    """Size in bytes of a stored object."""

    key: str
    size: int


class ObjectStore:
    """Objects under keys like `archive/2026/11/x.jsonl`: segments of letters, digits and `._=@+-`, parted by `/`, never `.` or `..`.

    Every method does its blocking work in a thread, under `breaker`, and raises InvalidError `invalid_object_key` for another key,
    ObjectNotFoundError where nothing is stored, ObjectsUnavailableError when the store fails, CircuitOpenError when nothing was tried.
    """

    def __init__(self, settings: ObjectStoreSettings) -> None:
        options = {name: value.get_secret_value() for name, value in settings.options.items()}
        found: tuple[fsspec.AbstractFileSystem, str] = url_to_fs(settings.url, **options)
        self._files, self._root = found
        self._local = "file" in _protocols(self._files)
        self.breaker = Breaker(
            "objects",
            failure_threshold=settings.breaker_failure_threshold,
            reset_after=timedelta(seconds=settings.breaker_reset_seconds),
            failures=(ObjectsUnavailableError,),
        )

    async def put(self, key: str, data: bytes | BinaryIO) -> int:
        """Stores `data` (a file is read from where it stands) and returns its size; replaces what was there at once, never half."""
        source = BytesIO(data) if isinstance(data, bytes) else data
        return await self._run(self._write, key, source)

    async def get(self, key: str) -> bytes:
        """The whole object. For large ones use `open`."""
        return await self._run(self._read, key)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[BinaryIO]:
        """The object as a seekable binary file. Its reads block: use it inside `asyncio.to_thread`."""
        file = await self._run(self._opened, key)
        try:
            yield file
        finally:
            await asyncio.to_thread(file.close)

    async def delete(self, key: str) -> None:
        """Removes the object; nothing happens when there is none."""
        try:
            await self._run(self._remove, key)
        except ObjectNotFoundError:
            return

    async def stat(self, key: str) -> ObjectStat:
        """Size of the object."""
        return ObjectStat(key, await self._run(self._size, key))

    async def keys(self, prefix: str) -> list[str]:
        """All keys under the folder `prefix`, sorted; empty when there are none. Unfinished writes are not listed."""
        return await self._run(self._listed, prefix)

    async def check(self) -> None:
        """Returns when the store answers, raises as everything else when not. Half open, it is the breaker's probe."""
        await self._run(self._reachable, "")

    async def _run(self, function: Callable[Concatenate[str, P], R], key: str, *more: P.args, **named: P.kwargs) -> R:
        async with self.breaker.guard():
            return await self._attempt(function, key, *more, **named)

    async def _attempt(self, function: Callable[Concatenate[str, P], R], key: str, *more: P.args, **named: P.kwargs) -> R:
        try:
            return await asyncio.to_thread(function, key, *more, **named)
        except FileNotFoundError as error:
            raise ObjectNotFoundError(key) from error
        except OSError as error:
            raise ObjectsUnavailableError(f"the object store failed: {error}") from error

    def _path(self, key: str) -> str:
        if len(key) > 512 or not _KEY.fullmatch(key):
            raise InvalidError(
                "invalid_object_key", "an object key is up to 512 characters of letters, digits and ._=@+-/ without . or .. segments", "key"
            )
        return f"{self._root.rstrip('/')}/{key}"

    def _write(self, key: str, source: BinaryIO) -> int:
        path = self._path(key)
        if not self._local:  # object stores show an upload only when it is complete
            with self._files.open(path, "wb") as target:
                shutil.copyfileobj(source, target)
                return int(target.tell())
        return _write_file(Path(path), source)

    def _read(self, key: str) -> bytes:
        return bytes(self._files.cat_file(self._path(key)))

    def _opened(self, key: str) -> BinaryIO:
        file: BinaryIO = self._files.open(self._path(key), "rb")
        return file

    def _remove(self, key: str) -> None:
        self._files.rm_file(self._path(key))

    def _size(self, key: str) -> int:
        return int(self._files.size(self._path(key)))

    def _listed(self, prefix: str) -> list[str]:
        found = self._files.find(self._path(prefix))
        keys = (str(path)[len(self._root.rstrip("/")) + 1 :] for path in found)
        return sorted(key for key in keys if _PARTIAL not in key)

    def _reachable(self, _: str) -> None:
        if self._local:
            Path(self._root).mkdir(parents=True, exist_ok=True)
        self._files.exists(self._root)  # an empty prefix of a bucket does not exist; what counts is that the question is answered


def _write_file(path: Path, source: BinaryIO) -> int:
    """Whoever reads `path` sees the old content or the new, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_PARTIAL}{uuid4().hex}")
    try:
        size = _written(partial, source)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _written(path: Path, source: BinaryIO) -> int:
    """Copies to a new file and waits until it is on disk. Returns the size."""
    with path.open("xb") as target:
        shutil.copyfileobj(source, target)
        target.flush()
        os.fsync(target.fileno())
        return target.tell()


def _protocols(files: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
