"""Files of every format into arrays, through the real DuckDB and a real folder of objects."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from tessera.contracts.errors import InvalidError
from tessera.contracts.events import DatasetReference
from tessera.storage import ObjectStore, ObjectStoreSettings
from tessera.validator.adapters.datasets import DuckDbReader, ReadingLimits
from tessera.validator.ports import LoadedCandidate, LoadedComparison

pytestmark = pytest.mark.unit

CSV = b"n,when,label,ok\n1,2026-01-01,a,true\n-0.0,2026-01-02,,false\nnan,2026-01-03,b,true\n"


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore(ObjectStoreSettings(url=(tmp_path / "objects").as_uri()))


async def stored(objects: ObjectStore, data: bytes, kind: str = "csv") -> DatasetReference:
    digest = hashlib.sha256(data).hexdigest()
    key = f"datasets/t/{digest}.{kind}"
    await objects.put(key, data)
    return DatasetReference.model_validate(
        {"dataset_id": digest[:12], "object_key": key, "format": kind, "size_bytes": len(data), "sha256": digest}
    )


async def loaded(objects: ObjectStore, *datasets: DatasetReference, **limits: int) -> Any:
    async with DuckDbReader(objects, ReadingLimits(**limits), Path(tempfile.gettempdir())).loading(datasets) as found:
        return found


def parquet(tmp_path: Path, query: str) -> bytes:
    file = tmp_path / "made.parquet"
    duckdb.connect().execute(f"COPY ({query}) TO '{file}' (FORMAT parquet)")
    return file.read_bytes()


async def compared(objects: ObjectStore, candidate: bytes, reference: bytes, kinds: Sequence[str] = ("csv", "csv")) -> LoadedComparison:
    found = await loaded(objects, await stored(objects, candidate, kinds[0]), await stored(objects, reference, kinds[1]))
    assert isinstance(found, LoadedComparison)
    return found


async def test_numbers_times_and_categories_come_with_their_gaps(objects: ObjectStore) -> None:
    found = (await compared(objects, CSV, CSV)).comparison
    assert (found.columns.numeric, found.columns.categorical) == (("n", "when"), ("label", "ok"))
    order = np.argsort(found.candidate.numeric[:, 1])
    assert np.array_equal(found.candidate.numeric[order, 0], [1.0, 0.0, np.nan], equal_nan=True)
    assert found.candidate.codes[order, 0].tolist() == [0, -1, 1]
    assert np.diff(np.sort(found.candidate.numeric[:, 1])).tolist() == [86_400.0, 86_400.0]


async def test_the_same_rows_are_the_same_in_every_format(objects: ObjectStore, tmp_path: Path) -> None:
    rows = [{"a": 0.1 * number, "b": f"x{number % 3}"} for number in range(50)]
    csv = "\n".join(["a,b", *(f"{row['a']!r},{row['b']}" for row in rows)]).encode()
    jsonl = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(jsonl)
    columnar = parquet(tmp_path, f"SELECT * FROM read_json('{tmp_path / 'rows.jsonl'}')")
    for kind, data in (("jsonl", jsonl), ("parquet", columnar)):
        found = (await compared(objects, data, csv, (kind, "csv"))).comparison
        assert sorted(found.candidate.hashes.tolist()) == sorted(found.reference.hashes.tolist())
        assert np.array_equal(found.candidate.codes, found.reference.codes)


async def test_categories_are_numbered_alike_on_both_sides(objects: ObjectStore) -> None:
    found = (await compared(objects, b"c\nz\nb\n", b"c\na\nb\n")).comparison
    assert set(found.candidate.codes[:, 0]) & set(found.reference.codes[:, 0]) == {1}


async def test_whole_numbers_and_fractions_meet_as_numbers(objects: ObjectStore) -> None:
    found = (await compared(objects, b"a\n1\n2\n", b"a\n1.0\n2.0\n")).comparison
    assert sorted(found.candidate.hashes.tolist()) == sorted(found.reference.hashes.tolist())


async def test_missing_and_differing_columns_are_doubts(objects: ObjectStore) -> None:
    found = await compared(objects, b"a,b,extra\n1,x,1\n2,y,2\n", b"a,b,c\n1,1,1\n2,2,2\n")
    assert found.comparison.columns.names == ("a",)
    assert [doubt.split(":")[0] for doubt in found.doubts] == ["columns_missing", "column_types_differ"]


async def test_a_candidate_alone_is_counted(objects: ObjectStore) -> None:
    assert await loaded(objects, await stored(objects, CSV)) == LoadedCandidate(3, ("n", "when", "label", "ok"))


async def test_a_large_file_is_sampled_and_hashed_whole(objects: ObjectStore, tmp_path: Path) -> None:
    data = parquet(tmp_path, "SELECT range AS a, range % 7 AS b FROM range(5000)")
    one, other = await stored(objects, data, "parquet"), await stored(objects, data, "parquet")
    first, second = [(await loaded(objects, one, other, sampled_rows=100)).comparison.candidate for _ in range(2)]
    assert (first.rows, first.sampled_rows) == (5000, 100)
    assert np.array_equal(first.numeric, second.numeric)


@pytest.mark.parametrize(
    ("candidate", "reference", "code"),
    [
        (b"", b"a\n1\n", "dataset_empty"),
        (b"a\n", b"a\n1\n", "dataset_empty"),
        (b"a\n1\n", b"a\n", "dataset_empty"),
        (b"x\n1\n", b"a\n1\n", "no_common_columns"),
        (b"a\nx\n", b"a\n1\n", "no_common_columns"),
        (b'a,b\n1,"never closed\n', b"a\n1\n", "dataset_unreadable"),
        (b"a,b\n1,2\n1,2,3\n", b"a\n1\n", "dataset_unreadable"),
        (b"a\n\xff\xfe\n", b"a\n1\n", "dataset_unreadable"),
    ],
)
async def test_bad_files_have_codes(objects: ObjectStore, candidate: bytes, reference: bytes, code: str) -> None:
    with pytest.raises(InvalidError) as raised:
        await compared(objects, candidate, reference)
    assert raised.value.code == code
    assert "/tmp" not in raised.value.message


@pytest.mark.parametrize(("limit", "code"), [({"bytes": 5}, "dataset_too_large"), ({"columns": 1}, "too_many_columns")])
async def test_limits_have_codes(objects: ObjectStore, limit: dict[str, int], code: str) -> None:
    dataset = await stored(objects, CSV)
    with pytest.raises(InvalidError) as raised:
        await loaded(objects, dataset, dataset, **limit)
    assert raised.value.code == code


async def test_other_limits_hold_from_the_next_dataset_on(objects: ObjectStore, tmp_path: Path) -> None:
    reader, dataset = DuckDbReader(objects, ReadingLimits(), tmp_path), await stored(objects, CSV)
    async with reader.loading([dataset]):
        reader.limit(ReadingLimits(bytes=5))
    with pytest.raises(InvalidError, match="larger than 5 bytes"):
        async with reader.loading([dataset]):
            raise AssertionError


async def test_a_dataset_that_needs_more_memory_than_allowed_fails(objects: ObjectStore, tmp_path: Path) -> None:
    wide = parquet(tmp_path, "SELECT repeat('x', 40000000) || range AS a FROM range(6)")
    dataset = await stored(objects, wide, "parquet")
    with pytest.raises(InvalidError) as raised:
        await loaded(objects, dataset, dataset, memory_megabytes=64, threads=1)
    assert raised.value.code == "dataset_too_large"


async def test_nothing_stays_on_disk(objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    await compared(objects, CSV, CSV)
    with pytest.raises(InvalidError):
        await compared(objects, b"", CSV)
    assert list(scratch.iterdir()) == []


async def test_a_file_cannot_reach_beyond_itself(objects: ObjectStore, tmp_path: Path) -> None:
    """A column's name is quoted, and the sandbox opens no other file."""
    secret = tmp_path / "secret.csv"
    secret.write_text("s\n1\n")
    name = f"a\" FROM read_csv('{secret}') --"
    data = f'"{name.replace(chr(34), chr(34) * 2)}"\n1\n2\n'.encode()
    found = (await compared(objects, data, data)).comparison
    assert found.columns.names == (name,)
