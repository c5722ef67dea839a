"""Tables that tokenize makes on its way, each kept whole once it is made: a start after a kill reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from stages.ground import disk
from stages.keeping.folder import RunFolder
from stages.keeping.store import Part

FACTS = "facts.json"
Made = tuple[datasets.Dataset, dict[str, Any]]
"""A dataset that lies in Arrow files, memory-mapped, and what else is known of it, as JSON holds it."""


class Keeper:
    """Keeps what is made in a run's folder: one table is one atom, however long it takes."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._scratch = disk.temporary(run.path / "scratch")
        disk.remove(self._scratch)  # of a start that was killed

    def kept(self, scope: str, make: Callable[[Path], Made]) -> Made:
        """What `make` makes, given a folder for its files; it is made once for each `scope` of the run.

        Raises:
            SaveError: it cannot be kept.
        """
        atoms = self._run.atoms(scope)
        while (parts := next((parts for _, parts in atoms.read()), None)) is None:
            self._scratch.mkdir()
            try:
                dataset, facts = make(self._scratch)
                files = [Path(entry["filename"]) for entry in dataset.cache_files]
                atoms.write(0, sum(file.stat().st_size for file in files), partial(_write, files, facts))
            finally:
                shutil.rmtree(self._scratch, ignore_errors=True)
        return _read(parts)


def _write(files: Sequence[Path], facts: dict[str, Any], folder: Path) -> None:
    for number, file in enumerate(files):
        disk.link(file, folder / f"{number:05d}.arrow")
    (folder / FACTS).write_text(disk.dumps(facts), encoding="utf-8")


def _read(parts: dict[str, Part]) -> Made:
    tables = [datasets.Dataset.from_file(str(parts[name].path)) for name in sorted(parts) if name != FACTS]
    facts: dict[str, Any] = json.loads(parts[FACTS].path.read_text(encoding="utf-8"))
    return datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0], facts
