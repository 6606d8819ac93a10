"""Header names that are no UTF-8: every record of a batch is read, whatever stands in its headers."""

import pytest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from hypothesis import given
from hypothesis import strategies as st

from tessera.bus.unreadable import ReadableRecords

pytestmark = pytest.mark.unit

Header = tuple[bytes, bytes | None]
Fields = tuple[bytes | None, bytes | None, list[Header]]

small = st.binary(max_size=12)
records = st.tuples(st.none() | small, st.none() | small, st.lists(st.tuples(small, st.none() | small), max_size=3))
batches = st.lists(st.lists(records, min_size=1, max_size=5), min_size=1, max_size=4)


class Name(str):
    """A header's name that is encoded to bytes of our choice."""

    stored: bytes

    def encode(self, *_: object) -> bytes:
        return self.stored


def name(stored: bytes) -> Name:
    made = Name()
    made.stored = stored
    return made


def written(batch: list[Fields], base_offset: int, compression: int) -> bytes:
    builder = _DefaultRecordBatchBuilderPy(2, compression, 0, -1, -1, -1, 10**6)
    for number, (key, value, headers) in enumerate(batch):
        builder.append(number, 1_000 + number, key, value, [(name(stored), content) for stored, content in headers])
    data = builder.build()
    data[0:8] = base_offset.to_bytes(8, "big")  # outside the checksum: the broker sets it
    return bytes(data)


@given(batches, st.sampled_from([0, 1]))
def test_every_record_is_read_as_it_was_written(given_batches: list[list[Fields]], compression: int) -> None:
    data = b""
    expected: list[tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]] = []
    for batch in given_batches:
        base = len(expected)
        data += written(batch, base, compression)
        for number, (key, value, headers) in enumerate(batch):
            names = [(stored.decode("utf-8", errors="replace"), content) for stored, content in headers]
            expected.append((base + number, 1_000 + number, key, value, names))
    readable = ReadableRecords(data + b"an incomplete batch")
    found = []
    while readable.has_next():
        batch_read = readable.next_batch()
        assert batch_read is not None
        assert batch_read.validate_crc()
        found += [(record.offset, record.timestamp, record.key, record.value, list(record.headers)) for record in batch_read]
    assert found == expected
    assert readable.next_batch() is None
