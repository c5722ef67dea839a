"""What is done: `--until-done` gives up where starts, also those of a scheduler, add nothing to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from stages.ground import disk
from stages.keeping.folder import list_runs, runs_root
from stages.repro.healing import LOCK_FILE

RECORD = ".starts.json"  # beside the runs, as what a scheduler starts again may find nothing else


def done() -> set[str]:
    """A name for each atom, each run's newest step and result, and each state of dvc.lock."""
    found = set()
    for run in list_runs():
        marks = [key.name for key in run.atom_keys()] + [f"step {step}" for step in run.checkpoints.steps()[:1]]
        found |= {f"{run.id} {mark}" for mark in [*marks, *["finished"] * run.finished]}
    with contextlib.suppress(OSError):
        found.add(disk.sha256_file(LOCK_FILE))
    return found


def count_start() -> int:
    """Count a start, of whichever process: how many in a row, with this one, began with just what is done now."""
    state = hashlib.sha256("\n".join(sorted(done())).encode()).hexdigest()
    before = _read()
    starts = 1 + (before["starts"] if before["done"] == state else 0)
    _write({"done": state, "starts": starts})
    return starts


def uncount_start() -> None:
    """The last start counts for nothing."""
    before = _read()
    _write(before | {"starts": before["starts"] - 1})


def forget_starts() -> None:
    """The next start is the first of its row."""
    (runs_root() / RECORD).unlink(missing_ok=True)


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or not ours
        values = json.loads((runs_root() / RECORD).read_text(encoding="utf-8"))
        return {"done": values["done"], "starts": int(values["starts"])}
    return {"done": None, "starts": 1}


def _write(values: dict[str, Any]) -> None:
    disk.write_text(runs_root() / RECORD, disk.dumps(values))
