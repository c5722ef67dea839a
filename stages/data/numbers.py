"""Columns of numbers: text to float64, what is no usable number, and moments of columns too long for memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.origin import Origin
from stages.ground.errors import UserError, quote

Float64 = npt.NDArray[np.float64]
# Models compute in float32: what lies beyond would become infinite there.
LARGEST = float(np.finfo(np.float32).max)


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a column of `kind` holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number_type(kind: pa.DataType) -> bool:
    """Whether a column of `kind` can hold numbers: text that is parsed, any number, or true and false."""
    is_type = pa.types
    tests = (is_type.is_integer, is_type.is_floating, is_type.is_decimal, is_type.is_boolean, is_type.is_null)
    return any(test(kind) for test in (*tests, is_text_type))


def to_float64(values: pa.ChunkedArray, where: str, column: str, start: int) -> pa.ChunkedArray:
    """`values` as float64, text parsed, true and false as 1 and 0; null stays null. `start` is the first row's number.

    Raises:
        UserError: text that is no number, with its row.
    """
    if not is_text_type(values.type):
        return pc.cast(values, pa.float64(), safe=False)  # more digits than a float64 has are rounded
    text = pc.utf8_trim_whitespace(pc.cast(values, pa.string()))
    try:
        return pc.cast(text, pa.float64())
    except pa.ArrowInvalid:
        row, cell = next((row, cell) for row, cell in enumerate(text.to_pylist()) if not _is_number(cell))
        what = f"holds {quote(cell)}" if cell else "is empty"
        raise _unusable(f"{where}: row {start + row}", column, what) from None


def _is_number(cell: str | None) -> bool:
    try:
        pc.cast(pa.scalar(cell, pa.string()), pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def refuse_unusable(values: pa.ChunkedArray, origin: Origin, column: str, position: int) -> None:
    """Raise `UserError`, with its row, for the first null, nan or number beyond float32; `position` is the first's."""
    row = pc.index(pc.fill_null(pc.less_equal(pc.abs(values), LARGEST), False), False).as_py()
    if row >= 0:
        found = values[row].as_py()
        raise _unusable(origin.row(position + row), column, "is null" if found is None else f"holds {found}")


def _unusable(row: str, column: str, what: str) -> UserError:
    return UserError(
        f"{row}, column {quote(column)} {what}; every row needs a finite number there, "
        f"at most {LARGEST:.2g}: correct the row or remove it"
    )


class Moments:
    """Smallest, largest, mean and standard deviation of columns that come a batch of rows at a time.

    Batches are merged by the method of Chan, Golub and LeVeque, which sums no squares of large numbers.
    """

    def __init__(self, columns: int) -> None:
        self.rows = 0
        self.low, self.high = np.full(columns, np.inf), np.full(columns, -np.inf)
        self._mean, self._squares = np.zeros(columns), np.zeros(columns)

    def add(self, values: Float64) -> None:
        """Take in more rows; `values` is of shape (columns, rows)."""
        rows = values.shape[1]
        mean = values.mean(axis=1)
        apart = mean - self._mean
        self._squares += np.square(values - mean[:, None]).sum(axis=1)
        self._squares += np.square(apart) * (self.rows * rows / (self.rows + rows))
        self._mean += apart * (rows / (self.rows + rows))
        self.rows += rows
        self.low, self.high = np.minimum(self.low, values.min(axis=1)), np.maximum(self.high, values.max(axis=1))

    @property
    def mean(self) -> Float64:
        """Of each column, float64 (columns,); of a constant one exactly its number."""
        return np.where(self.low == self.high, self.low, self._mean)

    @property
    def std(self) -> Float64:
        """Of each column, as of a whole population, float64 (columns,); of a constant one exactly 0."""
        return np.where(self.low == self.high, 0.0, np.sqrt(self._squares / self.rows))


def column_matrix(table: pa.Table) -> Float64:
    """The columns of `table`, float64 (columns, rows)."""
    return np.stack([column.to_numpy() for column in table.columns])
