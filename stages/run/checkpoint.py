"""Checkpoints: what one is on disk, when one can be trusted, and which are kept.

`checkpoints/step-00000230/` holds `state.json`, one `<part>.safetensors` for every part of the state with tensors,
and `manifest.json`, written last, with every file's size and sha256. What a state *contains* is said in one place:
`stages.training.state.TrainState.state_dict`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.config.errors import UserError
from stages.run import codec
from stages.storage import files

MANIFEST, STATE = "manifest.json", "state.json"
KEPT = 2
DAMAGED = "damaged-"


class SaveError(UserError):
    """A checkpoint could not be written; the last good one is untouched. One line, with the bytes needed."""


class DamagedError(Exception):
    """A folder is not the checkpoint that was written. One line: which file, and what is wrong."""


def step_name(step: int) -> str:
    """`step-00000230`: the name of a checkpoint's or candidate's folder; sorts by step."""
    return f"step-{step:08d}"


@contextmanager
def disk_errors(folder: Path, what: str, needed: int) -> Iterator[None]:
    """Turn an OSError while writing `what` below `folder` into a SaveError that names the `needed` bytes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        raise SaveError(
            f"{what} could not be written to {folder}: {'the disk is full' if full else error}; it needs {needed} "
            f"bytes, {shutil.disk_usage(folder).free} are free; the last good checkpoint is kept: make room, or move "
            "the runs with HOLDFAST_RUNS, and run the same command again"
        ) from error


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of the state at one step, out of reach of the loop that goes on changing it."""

    step: int
    skeletons: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]

    @classmethod
    def of(cls, step: int, state: dict[str, codec.Tree]) -> Snapshot:
        parts = {name: codec.split(tree, name) for name, tree in state.items()}
        return cls(step, {n: p[0] for n, p in parts.items()}, {n: p[1] for n, p in parts.items() if p[1]})

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in self.tensors.values() for t in part.values())


def write_manifest(folder: Path, **about: Any) -> None:
    """The commit mark of a folder: size and sha256 of every file in it, and what `about` says of them."""
    entries = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": files.sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(files.dumps({**about, "files": entries}), encoding="utf-8")


def verify(folder: Path, **about: Any) -> None:
    """Check a folder against its manifest, and the manifest against `about`.

    Raises:
        DamagedError: naming the first file that is missing, of the wrong size, or of the wrong content.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {MANIFEST} is missing, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST}: unreadable ({type(error).__name__})") from None
    for key, value in about.items():
        if manifest.get(key) != value:
            raise DamagedError(f"{folder / MANIFEST}: {key} is {manifest.get(key)!r}, expected {value!r}")
    for name, (size, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path}: missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{path}: {path.stat().st_size} bytes, expected {size}")
        if files.sha256_file(path) != sha256:
            raise DamagedError(f"{path}: content does not match its sha256")


class CheckpointStore:
    """The checkpoints of one run, below `folder`. `identity` is the run's id: no other run's are ever loaded."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity
        folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, newest first; not yet verified."""
        names = [p.name.removeprefix("step-") for p in self.folder.glob("step-*") if p.is_dir()]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / step_name(step)

    def write(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint durably; only then remove the ones beyond the newest two.

        Raises:
            SaveError: disk full, no permission, or any other OSError; earlier checkpoints stay.
        """

        def fill(folder: Path) -> None:
            (folder / STATE).write_text(json.dumps(snapshot.skeletons), encoding="utf-8")
            for part, tensors in snapshot.tensors.items():
                save_file(tensors, folder / f"{part}.safetensors")
            # The content must be on disk before the mark that vouches for it.
            for path in folder.iterdir():
                files.fsync(path)
            write_manifest(folder, identity=self.identity, step=snapshot.step)

        with disk_errors(self.folder, f"checkpoint {step_name(snapshot.step)}", snapshot.bytes):
            files.write_folder(self.path(snapshot.step), fill)
            for step in self.steps()[KEPT:]:
                files.remove(self.path(step))

    def read(self, step: int) -> dict[str, codec.Tree]:
        """The verified state at `step`, tensors on the CPU. Raises DamagedError."""
        folder = self.path(step)
        verify(folder, identity=self.identity, step=step)
        try:
            skeletons = json.loads((folder / STATE).read_text(encoding="utf-8"))
            state = {}
            for part, skeleton in skeletons.items():
                path = folder / f"{part}.safetensors"
                state[part] = codec.join(skeleton, load_file(path) if path.exists() else {})
            return state
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise DamagedError(f"{folder}: unreadable ({type(error).__name__}: {error})") from None

    def refers_to(self, part: str) -> Iterator[Any]:
        """`part` of every committed checkpoint's state, where it holds no tensors; unreadable ones are passed over."""
        for step in self.steps():
            try:
                yield json.loads((self.path(step) / STATE).read_text(encoding="utf-8"))[part]
            except (OSError, ValueError, KeyError):
                continue

    def newest(
        self, accept: Callable[[dict[str, codec.Tree]], None], set_aside: Callable[[int, str], None]
    ) -> dict[str, codec.Tree] | None:
        """The newest state that verifies, or None.

        Args:
            accept: raises DamagedError if what the state refers to outside its folder is not intact.
            set_aside: told the step and the reason of each checkpoint that was passed over; it has been renamed
                to `damaged-step-…`, so that it is neither used nor lost.
        """
        files.remove_temporaries(self.folder)
        for step in self.steps():
            try:
                state = self.read(step)
                accept(state)
                return state
            except DamagedError as error:
                self._rename_damaged(step)
                set_aside(step, str(error))
        return None

    def _rename_damaged(self, step: int) -> None:
        for name in self._damaged_names(step):
            if not (self.folder / name).exists():
                os.rename(self.path(step), self.folder / name)
                files.fsync(self.folder)
                return

    @staticmethod
    def _damaged_names(step: int) -> Iterator[str]:
        number = 0
        while True:
            yield f"{DAMAGED}{step_name(step)}" + (f"-{number}" if number else "")
            number += 1
