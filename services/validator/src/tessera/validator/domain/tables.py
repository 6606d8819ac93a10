"""Two tables over the columns that they share, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tessera.contracts.errors import InvalidError

Floats: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.int64]
Hashes: TypeAlias = NDArray[np.uint64]

_IDENTIFIER_SHARE = 0.5
_IDENTIFIER_MINIMUM = 50


@dataclass(frozen=True, slots=True)
class Table:
    """One dataset over the shared columns.

    `hashes` has one value for every row of the file, equal for equal rows. `numeric` (rows × columns, NaN is missing)
    and `codes` (rows × columns, -1 is missing, numbered alike in both tables) hold the rows that evidence is computed
    from: all of them, or `rows` of them drawn by row hash where the file is larger.
    """

    hashes: Hashes
    numeric: Floats
    codes: Codes

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return len(self.hashes)

    @property
    def sampled_rows(self) -> int:
        """Rows that evidence is computed from."""
        return len(self.numeric)

    def take(self, indices: NDArray[np.intp]) -> Table:
        """The rows at `indices`, of a table that is not sampled."""
        return Table(self.hashes[indices], self.numeric[indices], self.codes[indices])


@dataclass(frozen=True, slots=True)
class Columns:
    """The shared columns, in the order of the arrays."""

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, numeric first."""
        return self.numeric + self.categorical


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate and the reference that it is judged against."""

    candidate: Table
    reference: Table
    columns: Columns


def usable(comparison: Comparison) -> Comparison:
    """Leaves out what can carry no evidence: empty or constant reference columns, and identifiers among the categories.

    A column that is constant in the candidate alone stays: that is a loss. Raises InvalidError `no_usable_columns`.
    """
    numeric = [index for index in range(len(comparison.columns.numeric)) if _varies(comparison.reference.numeric[:, index])]
    categorical = [index for index in range(len(comparison.columns.categorical)) if _repeats(comparison.reference.codes[:, index])]
    if not numeric and not categorical:
        raise InvalidError("no_usable_columns", "No shared column varies in the reference without being an identifier.")
    columns = Columns(
        tuple(comparison.columns.numeric[index] for index in numeric),
        tuple(comparison.columns.categorical[index] for index in categorical),
    )
    return Comparison(_selected(comparison.candidate, numeric, categorical), _selected(comparison.reference, numeric, categorical), columns)


def _selected(table: Table, numeric: list[int], categorical: list[int]) -> Table:
    return Table(table.hashes, np.ascontiguousarray(table.numeric[:, numeric]), np.ascontiguousarray(table.codes[:, categorical]))


def _varies(column: Floats) -> bool:
    present = column[np.isfinite(column)]
    return len(present) > 1 and bool(present.min() < present.max())


def _repeats(column: Codes) -> bool:
    """More than one category, and not a name for nearly every row."""
    present = column[column >= 0]
    distinct = len(np.unique(present))
    return distinct > 1 and not (distinct > _IDENTIFIER_MINIMUM and distinct > _IDENTIFIER_SHARE * len(present))
