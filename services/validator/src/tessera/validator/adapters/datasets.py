"""Datasets from the object store through DuckDB into arrays, in a sandbox without network, extensions or other files."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import duckdb
import numpy as np
from numpy.typing import NDArray

from tessera.contracts.errors import InvalidError
from tessera.contracts.events import DatasetReference
from tessera.storage import ObjectStore
from tessera.validator.domain.tables import Columns, Comparison, Table
from tessera.validator.ports import LoadedCandidate, LoadedComparison

# skip = 0 and the fixed delimiter: left to guess, DuckDB drops the rows before a ragged one without a word.
_READERS: Final = {
    "csv": "read_csv({}, header = true, skip = 0, delim = ',', quote = '\"', sample_size = -1)",
    "parquet": "read_parquet({})",
    "jsonl": "read_json({}, format = 'newline_delimited', sample_size = -1)",
}
_INTEGERS: Final = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_NUMERIC: Final = (*_INTEGERS, *(f"U{name}" for name in _INTEGERS), "FLOAT", "DOUBLE", "DECIMAL")
_TEMPORAL: Final = ("DATE", "TIMESTAMP")
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ReadingLimits:
    """What reading may cost."""

    memory_megabytes: int = 512
    """DuckDB's own memory; beyond it, it spills to the folder of the datasets."""
    threads: int = 2
    bytes: int = 2 << 30
    """Of one dataset."""
    columns: int = 200
    sampled_rows: int = 20_000
    """Rows that evidence is computed from; repeats and copies are counted over all rows."""


class DuckDbReader:
    """`DatasetReader` over an object store. Nothing of a dataset stays on disk afterwards, unless the process is killed."""

    def __init__(self, objects: ObjectStore, limits: ReadingLimits, scratch: Path) -> None:
        self._objects = objects
        self._limits = limits
        self._scratch = scratch

    def limit(self, limits: ReadingLimits) -> None:
        """Has other limits from the next dataset on."""
        self._limits = limits

    @asynccontextmanager
    async def loading(self, datasets: Sequence[DatasetReference]) -> AsyncIterator[LoadedComparison | LoadedCandidate]:
        """See the port."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._scratch))
        try:
            files = [await self._fetched(dataset, folder / f"{index}.{dataset.format}") for index, dataset in enumerate(datasets)]
            yield await asyncio.to_thread(_loaded, files, [dataset.format for dataset in datasets], folder, self._limits)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _fetched(self, dataset: DatasetReference, target: Path) -> Path:
        """Copies the object to a file of its own and checks that it is what was asked for."""
        if max(dataset.size_bytes, (await self._objects.stat(dataset.object_key)).size) > self._limits.bytes:
            message = f"The dataset {dataset.dataset_id!r} is larger than {self._limits.bytes} bytes."
            raise InvalidError("dataset_too_large", message)
        async with self._objects.open(dataset.object_key) as source:
            digest = await asyncio.to_thread(_copied, source, target)
        if digest != dataset.sha256:
            raise InvalidError("dataset_changed", f"The dataset {dataset.dataset_id!r} is not what was asked for: its SHA-256 differs.")
        return target


def _copied(source: BinaryIO, target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _loaded(files: Sequence[Path], formats: Sequence[str], folder: Path, limits: ReadingLimits) -> LoadedComparison | LoadedCandidate:
    """Blocks. The first file is the candidate, the second one, if any, the reference."""
    connection = _sandbox(files, folder, limits)
    try:
        named = zip(("candidate", "reference"), files, formats, strict=False)
        columns = [_described(connection, name, file, kind) for name, file, kind in named]
        rows = [_counted(connection, name) for name in ("candidate", "reference")[: len(files)]]
        if len(files) == 1:
            return LoadedCandidate(rows[0], tuple(columns[0]))
        return _compared(connection, columns[0], columns[1], limits)
    except duckdb.OutOfMemoryException as error:
        raise InvalidError("dataset_too_large", "The datasets do not fit the memory that reading them may use.") from error
    except duckdb.Error as error:
        raise InvalidError("dataset_unreadable", _without_folder(str(error), folder)) from error
    finally:
        connection.close()


def _sandbox(files: Sequence[Path], folder: Path, limits: ReadingLimits) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        config={
            "memory_limit": f"{limits.memory_megabytes}MB",
            "threads": str(limits.threads),
            "temp_directory": str(folder / "spill"),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
    )
    connection.execute(f"SET allowed_paths = [{', '.join(_quoted(str(file)) for file in files)}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _described(connection: duckdb.DuckDBPyConnection, name: str, file: Path, kind: str) -> dict[str, str]:
    """Makes a view of the file and returns its columns with their types."""
    reader = _READERS[kind].format(_quoted(str(file)))
    connection.execute(f"CREATE VIEW {name} AS SELECT * FROM {reader}")  # noqa: S608 - constants and a quoted path of ours
    return {str(column): str(type_) for column, type_, *_ in connection.execute(f"DESCRIBE {name}").fetchall()}


def _counted(connection: duckdb.DuckDBPyConnection, name: str) -> int:
    rows = int(_row(connection.execute(f"SELECT count(*) FROM {name}"))[0])  # noqa: S608 - a constant
    if rows == 0:
        raise InvalidError("dataset_empty", f"The {name} has no rows.")
    return rows


def _row(result: duckdb.DuckDBPyConnection) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = result.fetchone()
    return row or (0,)


def _compared(
    connection: duckdb.DuckDBPyConnection, candidate: dict[str, str], reference: dict[str, str], limits: ReadingLimits
) -> LoadedComparison:
    shared = [column for column in reference if column in candidate]
    if not shared:
        raise InvalidError("no_common_columns", "The candidate and the reference have no column of the same name.")
    if len(shared) > limits.columns:
        raise InvalidError("too_many_columns", f"{len(shared)} shared columns are more than {limits.columns}.")
    kinds = {column: _kind(candidate[column], reference[column]) for column in shared}
    numeric = tuple(column for column in shared if kinds[column] in ("number", "time"))
    categorical = tuple(column for column in shared if kinds[column] == "category")
    columns = Columns(numeric, categorical)
    rows = [_read(connection, name, columns, kinds, limits) for name in ("candidate", "reference")]
    return LoadedComparison(Comparison(*_tables(rows), columns), _doubts(candidate, reference, kinds))


def _kind(left: str, right: str) -> str:
    if left.startswith(_NUMERIC) and right.startswith(_NUMERIC):
        return "number"
    if left.startswith(_TEMPORAL) and right.startswith(_TEMPORAL):
        return "time"
    mixed = left.startswith(_NUMERIC) != right.startswith(_NUMERIC) or left.startswith(_TEMPORAL) != right.startswith(_TEMPORAL)
    return "differs" if mixed else "category"


def _doubts(candidate: dict[str, str], reference: dict[str, str], kinds: dict[str, str]) -> tuple[str, ...]:
    missing = [column for column in reference if column not in candidate]
    differing = [column for column, kind in kinds.items() if kind == "differs"]
    doubts = []
    if missing:
        doubts.append(f"columns_missing: the candidate lacks {_some(missing)}.")
    if differing:
        doubts.append(f"column_types_differ: {_some(differing)} cannot be compared, their types differ.")
    return tuple(doubts)


def _some(columns: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(columns) - limit} more" if len(columns) > limit else ""
    return ", ".join(columns[:limit]) + more


@dataclass(frozen=True, slots=True)
class _Rows:
    """What was read of one dataset, categories still as text."""

    hashes: NDArray[np.uint64]
    numeric: NDArray[np.float64]
    categories: list[np.ma.MaskedArray[Any, Any]]


def _read(connection: duckdb.DuckDBPyConnection, name: str, columns: Columns, kinds: dict[str, str], limits: ReadingLimits) -> _Rows:
    if not columns.names:
        raise InvalidError("no_common_columns", "No shared column has comparable types on both sides.")
    values = [f"{_value(column, kinds[column])} AS c{index}" for index, column in enumerate(columns.names)]
    names = ", ".join(f"c{index}" for index in range(len(columns.names)))
    # The row number decides the sample, not the values: equal rows must not all be drawn or all be left out.
    connection.execute(
        f"CREATE TEMP TABLE {name}_rows AS SELECT row_number() OVER () AS number, hash({names}) AS hashed, {names} "  # noqa: S608
        f"FROM (SELECT {', '.join(values)} FROM {name})"
    )
    hashes = connection.execute(f"SELECT hashed FROM {name}_rows").fetchnumpy()["hashed"]  # noqa: S608
    sample = connection.execute(
        f"SELECT {names} FROM {name}_rows ORDER BY hash(number), number LIMIT {limits.sampled_rows}"  # noqa: S608
    ).fetchnumpy()
    found = [sample[f"c{index}"] for index in range(len(columns.names))]
    width = len(columns.numeric)
    numeric = [np.ma.filled(np.ma.asarray(column, dtype=np.float64), np.nan) for column in found[:width]]
    empty = np.empty((len(next(iter(found))), 0))
    return _Rows(
        np.asarray(hashes, dtype=np.uint64),
        np.column_stack(numeric) if numeric else empty,
        [np.ma.asarray(column) for column in found[width:]],
    )


def _value(column: str, kind: str) -> str:
    """NaN and infinity count as missing; a negative zero is zero."""
    name = '"' + column.replace('"', '""') + '"'
    if kind == "category":
        return f"CAST({name} AS VARCHAR)"
    number = f"epoch({name})" if kind == "time" else f"CAST({name} AS DOUBLE)"
    return f"CASE WHEN isfinite({number}) THEN {number} + 0.0 END"


def _tables(rows: Sequence[_Rows]) -> tuple[Table, Table]:
    """Numbers the categories alike on both sides."""
    candidate, reference = rows
    width = len(reference.categories)
    codes: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for left, right in zip(candidate.categories, reference.categories, strict=True):
        labels = np.unique(np.concatenate((_present(left), _present(right))))
        codes[0].append(_numbered(left, labels))
        codes[1].append(_numbered(right, labels))
    return tuple(  # type: ignore[return-value]
        Table(side.hashes, side.numeric, np.column_stack(found) if width else np.empty((len(side.numeric), 0), dtype=np.int64))
        for side, found in zip((candidate, reference), codes, strict=True)
    )


def _present(column: np.ma.MaskedArray[Any, Any]) -> NDArray[Any]:
    return np.asarray(column.compressed(), dtype=str)


def _numbered(column: np.ma.MaskedArray[Any, Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    codes = np.full(len(column), -1, dtype=np.int64)
    codes[~np.ma.getmaskarray(column)] = np.searchsorted(labels, _present(column))
    return codes


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _without_folder(message: str, folder: Path) -> str:
    """DuckDB's first line, without where the file lay."""
    return message.splitlines()[0].replace(f"{folder}/", "")[:500]
