"""Records whose header names are no UTF-8, which aiokafka 0.14 cannot read.

Kafka stores any bytes as a header's name; the Java client writes what is no UTF-8 as U+FFFD. aiokafka raises in the middle of a fetch:
the partition stands still for ever, and what it had taken from other partitions in the same call is never handed over. One producer
could so stop a neighbour. Such a batch is read here once more, slowly, as the Java client reads it.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any, Final

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import decode_varint

_BATCH_PREFIX: Final = struct.Struct(">qi")
"""Base offset and length of what follows: the first fields of every batch."""


class ReadableRecords:
    """aiokafka's `MemoryRecords` of one partition in one fetch response, able to read every header name."""

    def __init__(self, data: bytes) -> None:
        self._records: Any = MemoryRecords(data)
        self._data = memoryview(data)
        self._start = 0

    def size_in_bytes(self) -> int:
        """Bytes in the response, an incomplete batch at its end included."""
        return int(self._records.size_in_bytes())

    def has_next(self) -> bool:
        """Whether a whole batch follows."""
        return bool(self._records.has_next())

    def next_batch(self) -> _Batch | None:
        """The next batch; None after the last."""
        batch = self._records.next_batch()
        if batch is None:
            return None
        _, length = _BATCH_PREFIX.unpack_from(self._data, self._start)
        end = self._start + _BATCH_PREFIX.size + length
        stored, self._start = self._data[self._start : end], end
        return _Batch(batch, stored)


class _Batch:
    """aiokafka's batch, read again from its bytes where it fails on a header's name."""

    def __init__(self, batch: Any, stored: memoryview) -> None:
        self._batch = batch
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        """The record of a control batch, which has no headers."""
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        read = 0
        try:
            for record in self._batch:
                yield record
                read += 1
        except UnicodeDecodeError:
            yield from itertools.islice(_LenientBatch(self._stored), read, None)


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    """A batch of format 2 (KIP-98) whose header names may be any bytes."""

    def _read_msg(self, decode_varint: Any = decode_varint) -> _DefaultRecordPy:
        """The next record. aiokafka has checked the checksum, and the broker the structure."""
        _, position = decode_varint(self._buffer, self._pos)
        _, position = decode_varint(self._buffer, position)  # attributes: unused in this format
        after_first, position = decode_varint(self._buffer, position)
        timestamp = self.max_timestamp if self.timestamp_type == self.LOG_APPEND_TIME else self.first_timestamp + after_first
        after_base, position = decode_varint(self._buffer, position)
        key, position = self._nullable(position)
        value, position = self._nullable(position)
        count, position = decode_varint(self._buffer, position)
        headers = []
        for _ in range(count):
            name, position = self._nullable(position)
            content, position = self._nullable(position)
            headers.append(((name or b"").decode("utf-8", errors="replace"), content))
        self._pos: int = position
        return _DefaultRecordPy(self.base_offset + after_base, timestamp, self.timestamp_type, key, value, headers)

    def _nullable(self, position: int) -> tuple[bytes | None, int]:
        length, position = decode_varint(self._buffer, position)
        if length < 0:
            return None, position
        return bytes(self._buffer[position : position + length]), position + length


def read_every_header_name() -> None:
    """Let every consumer of this process read such records. aiokafka has no hook: the one name that its fetcher uses is replaced."""
    fetcher.MemoryRecords = ReadableRecords
