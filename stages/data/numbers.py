"""Columns of numbers: text to float64, what is no usable number, and moments of columns too long for memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Moments:
    """Smallest, largest, mean and standard deviation, as of a whole population, of a column of numbers.

    Sums are exact (`math.fsum`) and rounded once, so that neither the cut into batches nor the processor decides them.
    """

    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Moments:
        """Those of a column of float64 without nulls, which may be longer than memory: it is read twice."""
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        low, high = (fold(pick(chunk.to_numpy()) for chunk in chunks) for fold, pick in ((min, np.min), (max, np.max)))
        if low == high:
            return cls(float(low), float(high), float(low), 0.0)
        mean = math.fsum(value for chunk in chunks for value in chunk.to_numpy().tolist()) / len(column)
        squares = (np.square(chunk.to_numpy() - mean) for chunk in chunks)
        std = math.sqrt(math.fsum(value for square in squares for value in square.tolist()) / len(column))
        return cls(float(low), float(high), mean, std)


def column_matrix(table: pa.Table) -> Float64:
    """The columns of `table`, float64 (columns, rows)."""
    return np.stack([column.to_numpy() for column in table.columns])
