"""Tables that grow by a row and can be cut back to where a checkpoint saw them."""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from stages.ground.disk import fsync
from stages.ground.errors import UserError
from stages.keeping.sealed import DamagedError

Position = dict[str, int]
"""How much of a file a checkpoint saw: `bytes`, and the `crc32` of them."""


class History:
    """A tab-separated table with a header of `columns`, or those of the first row. Numbers are written so that they
    read back as the same number."""

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path = path
        self._columns = columns
        self._bytes = self._crc32 = 0

    def append(self, **values: float | int) -> None:
        """Add a row. Raises UserError if it has other columns than the rows before."""
        if not self._bytes:
            self._write("\t".join(values))
        with self.path.open(encoding="utf-8") as file:
            columns = file.readline().rstrip("\n").split("\t")
        if columns != list(values):
            raise UserError(f"{self.path}: the columns were {', '.join(columns)}, and now are {', '.join(values)}")
        self._write("\t".join(map(repr, values.values())))

    def rows(self) -> list[dict[str, float]]:
        """The table, read back."""
        with self.path.open(encoding="utf-8", newline="") as lines:
            return [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(lines, delimiter="\t")
            ]

    def state_dict(self) -> Position:
        return {"bytes": self._bytes, "crc32": self._crc32}

    def load_state_dict(self, state: Position) -> None:
        """Cut the file back to where it was."""
        os.truncate(self.path, state["bytes"])
        self._bytes, self._crc32 = state["bytes"], state["crc32"]

    def sync(self) -> None:
        """Force the rows to disk: a checkpoint that counts on them is about to be committed."""
        fsync(self.path)

    def check(self, position: Position) -> None:
        """Raise DamagedError unless the file still begins with what it held at `position`."""
        try:
            with self.path.open("rb") as file:
                content = file.read(position["bytes"])
        except OSError as error:
            raise DamagedError(f"{self.path}: {error.strerror}") from None
        if len(content) != position["bytes"] or zlib.crc32(content) != position["crc32"]:
            raise DamagedError(f"{self.path}: its first {position['bytes']} bytes are not those the checkpoint saw")

    def begin(self) -> None:
        """Start the file anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self._bytes = self._crc32 = 0
        if self._columns:
            self._write("\t".join(self._columns))

    def _write(self, line: str) -> None:
        content = (line + "\n").encode()
        with self.path.open("ab") as file:
            file.write(content)
        self._bytes += len(content)
        self._crc32 = zlib.crc32(content, self._crc32)
