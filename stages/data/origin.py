"""Where a split's rows come from, as messages name it: the file, and the number of a row in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Origin:
    """The `files` of a split in order, each with its number of rows; of a part cut off, the positions `chosen`."""

    files: Sequence[tuple[str, int]]
    chosen: npt.NDArray[np.int64] | None = None

    def __str__(self) -> str:
        name = self.files[0][0]
        return name if len(self.files) == 1 else f"{name} and {len(self.files) - 1} more"

    def row(self, position: int) -> str:
        """The row at `position` of the split, from 0: `data/train.csv: row 1`."""
        if self.chosen is not None:
            position = int(self.chosen[position])
        for name, rows in self.files[:-1]:
            if position < rows:
                return f"{name}: row {position + 1}"
            position -= rows
        return f"{self.files[-1][0]}: row {position + 1}"
