"""Numeric inputs, standardised: `tokenize` does it to the splits, a user to new rows for a trained model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch

from stages.data.columns import listing
from stages.data.numbers import Float64, Moments, is_number_type, refuse_unusable, to_float64
from stages.data.origin import Origin
from stages.ground import disk
from stages.ground.errors import UserError, quote

FILE = "features.json"
FRAME = "the data frame"


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Subtracts each column's `mean` in train and divides by its `std`, 1 for a constant column; both float64.

    Calling it gives what a model takes as `features`: `Standardizer.load("models/best")(frame)`.
    """

    columns: tuple[str, ...]
    mean: Float64
    std: Float64

    @classmethod
    def fit(cls, train: datasets.Dataset, columns: Sequence[str]) -> Standardizer:
        """The mean and standard deviation of `columns`, all float64, over the rows of `train`."""
        moments = [Moments.of(train.data.column(name)) for name in columns]
        means, stds = np.array([found.mean for found in moments]), np.array([found.std or 1.0 for found in moments])
        return cls(tuple(columns), means, stds)

    def save(self, folder: Path) -> None:
        """Write `features.json`."""
        values = {"columns": list(self.columns), "mean": self.mean.tolist(), "std": self.std.tolist()}
        disk.write_text(folder / FILE, disk.dumps(values))

    @classmethod
    def load(cls, folder: str | Path) -> Standardizer:
        """Read `features.json`. Raises `UserError` if it is not there."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"{path}: not there; it is written where data.feature_columns are set")
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(values["columns"]), np.array(values["mean"]), np.array(values["std"]))

    def __call__(self, frame: pd.DataFrame) -> torch.Tensor:
        """`frame`'s `columns`, standardised: float32 (rows, columns). Further columns are ignored.

        Raises:
            UserError: a missing column, a cell that is no finite number, or one too far from train's for float32.
        """
        counts = Counter(frame.columns)
        for name in self.columns:
            if counts[name] != 1:
                found = f"{counts[name]} columns" if counts[name] else "no column"
                raise UserError(f"{FRAME}: {found} {quote(name)}; the columns are {listing(list(frame.columns))}")
        values = np.stack([_numbers(frame[name], name) for name in self.columns])
        return torch.from_numpy(self.scale(values, Origin([(FRAME, len(frame))]), 0))

    def scale(self, values: Float64, origin: Origin, position: int) -> npt.NDArray[np.float32]:
        """`values` (columns, rows), standardised: float32 (rows, columns). `position` is the first row's in `origin`.

        Raises:
            UserError: a number too far from train's for float32.
        """
        with np.errstate(over="ignore"):
            scaled = ((values - self.mean[:, None]) / self.std[:, None]).T.astype(np.float32, order="C")
        if not np.isfinite(scaled).all():
            row, column = np.argwhere(~np.isfinite(scaled))[0]
            raise UserError(
                f"{origin.row(position + int(row))}, column {quote(self.columns[column])} holds {values[column, row]}, "
                f"too far from train's mean {self.mean[column]} at a standard deviation of {self.std[column]}; "
                "correct the row or remove it"
            )
        return scaled


def _numbers(series: pd.Series, name: str) -> Float64:
    try:
        cells = pa.chunked_array([pa.array(series)])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{FRAME}: column {quote(name)} holds things of several kinds: {error}") from None
    if not is_number_type(cells.type):
        raise UserError(f"{FRAME}: column {quote(name)} is {cells.type}; allowed are numbers, and text that is one")
    numbers = to_float64(cells, FRAME, name, 1)
    refuse_unusable(numbers, Origin([(FRAME, len(series))]), name, 0)
    return numbers.to_numpy()
