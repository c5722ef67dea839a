"""Tables that grow by a row and can be cut back to where a checkpoint saw them."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from stages.run.checkpoint import DamagedError
from stages.storage.files import fsync

Position = dict[str, int]
"""How much of a file a checkpoint saw: `bytes`, and the `crc32` of them."""


class History:
    """A tab-separated table with a header. Numbers are written so that they read back as the same number."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path = path
        self._columns = columns
        self._header = ("\t".join(columns) + "\n").encode()
        self._bytes = self._crc32 = 0

    def at(self, path: Path) -> History:
        """The same table in another place, at its beginning."""
        return History(path, self._columns)

    def append(self, **values: float | int) -> None:
        """Add a row; `values` are exactly the columns."""
        self._write(("\t".join(repr(values[column]) for column in self._columns) + "\n").encode())

    def position(self) -> Position:
        return {"bytes": self._bytes, "crc32": self._crc32}

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

    def restore(self, position: Position | None) -> None:
        """Cut the file back to `position`, or start it anew with its header if None."""
        if position is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self._bytes = self._crc32 = 0
            self._write(self._header)
        else:
            os.truncate(self.path, position["bytes"])
            self._bytes, self._crc32 = position["bytes"], position["crc32"]

    def _write(self, content: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(content)
        self._bytes += len(content)
        self._crc32 = zlib.crc32(content, self._crc32)
