"""Checkpoints: what one consists of, and how many are kept.

One at step 230 is the entry `checkpoints/step-00000230` of the run's store: `<part>.json` for every part of the state,
and `<part>.safetensors` for those with tensors. What the parts *are* is said in one place:
`stages.run.state.TrainState.parts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages.ground.errors import reason
from stages.keeping.sealed import DamagedError
from stages.keeping.store import Shelf
from stages.modeling import codec

KEPT = 2
TEXT, TENSORS = ".json", ".safetensors"


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

    def write(self, folder: Path) -> None:
        """Write its parts."""
        for part, skeleton in self.skeletons.items():
            (folder / (part + TEXT)).write_text(json.dumps(skeleton), encoding="utf-8")
        for part, tensors in self.tensors.items():
            save_file(tensors, folder / (part + TENSORS))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in self.tensors.values() for t in part.values())


class Checkpoints:
    """The checkpoints of one run: no other run's are ever loaded."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def write(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint durably; only then remove the ones beyond the newest two. Raises SaveError."""
        store, key = self.shelf.store, self.shelf.key(snapshot.step)
        store.begin(key, snapshot.bytes)
        store.put(key, snapshot.write)
        store.commit(key)
        self.shelf.remove_but({snapshot.step, *self.shelf.steps()[:KEPT]})

    def read(self, step: int) -> dict[str, codec.Tree]:
        """The verified state at `step`, tensors on the CPU. Raises DamagedError."""
        files = self.shelf.store.read(self.shelf.key(step))
        state = {}
        for name in [name for name in files if name.endswith(TEXT)]:
            part = name.removesuffix(TEXT)
            tensors = files.get(part + TENSORS)
            try:
                state[part] = codec.join(_load(files[name].path), load_file(tensors.path) if tensors else {})
            except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
                raise DamagedError(
                    f"{files[name].path}: unreadable ({type(error).__name__}: {reason(error)})"
                ) from None
        return state

    def peek(self, part: str) -> Iterator[codec.Tree]:
        """`part`, one without tensors, of every committed checkpoint that can be read. Nothing is verified."""
        for step in self.shelf.steps():
            try:
                yield codec.join(_load(self.shelf.store.path(self.shelf.key(step), part + TEXT)), {})
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                continue


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
