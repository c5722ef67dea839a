"""Tables that grow by a row and are part of every checkpoint: plots/train.tsv and plots/eval.tsv while they grow."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from stages.ground.errors import UserError

# Rows of a segment. Those of a full one are one text, which a save copies by reference.
SEGMENT_ROWS = 1000


class History:
    """A tab-separated table with a header of `columns`, or those of the first row. Numbers are written so that they
    read back as the same number."""

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self._columns = list(columns)
        self._segments: list[str] = []
        self._open: list[str] = []

    def append(self, **values: float | int) -> None:
        """Add a row. Raises UserError if it has other columns than the rows before."""
        self._columns = self._columns or list(values)
        if self._columns != list(values):
            raise UserError(f"the columns of the history were {', '.join(self._columns)}, and now are "
                            f"{', '.join(values)}")  # fmt: skip
        self._open.append("\t".join(map(repr, values.values())) + "\n")
        if len(self._open) == SEGMENT_ROWS:
            self._segments.append("".join(self._open))
            self._open = []

    def text(self) -> str:
        """The file: the header, where there are columns, and the rows."""
        header = "\t".join(self._columns) + "\n" if self._columns else ""
        return "".join((header, *self._segments, *self._open))

    def rows(self) -> list[dict[str, float]]:
        """The rows, as they are read back from the file."""
        lines = csv.DictReader(io.StringIO(self.text(), newline=""), delimiter="\t")
        return [{name: float(value) for name, value in row.items()} for row in lines]

    def state_dict(self) -> dict[str, Any]:
        """`columns`, and `segments`: texts of SEGMENT_ROWS rows, the last one of the rows since."""
        return {"columns": list(self._columns), "segments": [*self._segments, "".join(self._open)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        *self._segments, rest = state["segments"]
        self._columns, self._open = list(state["columns"]), rest.splitlines(keepends=True)
