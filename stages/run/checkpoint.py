"""Checkpoints: what one is on disk, when one can be trusted, and which are kept.

`checkpoints/step-00000230/` holds `state.json`, one `<part>.safetensors` for every part of the state with tensors,
and `manifest.json`, written last, with every file's size and sha256. What a state *contains* is said in one place:
`stages.run.state.TrainState.state_dict`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.ground import disk
from stages.ground.places import step_name, steps_in
from stages.keeping.sealed import DamagedError, disk_errors, seal, verify
from stages.run import codec

STATE = "state.json"
KEPT = 2
DAMAGED = "damaged-"


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


class CheckpointStore:
    """The checkpoints of one run, below `folder`. `identity` is the run's id: no other run's are ever loaded."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, newest first; not yet verified."""
        return steps_in(self.folder)

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
                disk.fsync(path)
            seal(folder, identity=self.identity, step=snapshot.step)

        with disk_errors(self.folder, f"checkpoint {step_name(snapshot.step)}", snapshot.bytes):
            disk.write_folder(self.path(snapshot.step), fill)
            for step in self.steps()[KEPT:]:
                disk.remove(self.path(step))

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
        disk.remove_temporaries(self.folder)
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
                disk.fsync(self.folder)
                return

    @staticmethod
    def _damaged_names(step: int) -> Iterator[str]:
        number = 0
        while True:
            yield f"{DAMAGED}{step_name(step)}" + (f"-{number}" if number else "")
            number += 1
