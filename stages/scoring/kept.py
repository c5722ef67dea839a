"""Predictions that outlive the process that made them, so that a split is gone on with after a kill."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.ground.places import step_name
from stages.keeping.atoms import Atoms

BATCHES, SCORES = "batches.safetensors", "scores.json"
_SCORES = TypeAdapter(dict[str, float])


def validation_of(step: int) -> str:
    """The scope of the predictions that train's evaluation at this step makes."""
    return f"validation.{step_name(step)}"


@dataclass(frozen=True)
class Scored:
    """A batch that was computed: its `number`, and by row the `logits` float32 (rows, outputs) and, unless the split
    has no labels, `losses` float32 (rows,), both on the CPU."""

    number: int
    logits: Tensor
    losses: Tensor | None


class Kept:
    """The batches of a split that a model was run on, in `atoms`.

    `before`: atoms in which somebody else left some of the same model and rows; they are read, and left there.
    """

    def __init__(self, atoms: Atoms, before: Sequence[Atoms] = ()) -> None:
        self._atoms, self._before = atoms, before
        self._scores = atoms.of(f"{atoms.scope}.scores")
        atoms.remove_others()
        self._numbers = atoms.numbers()

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return len(self._numbers)

    def read(self, batches: Sequence[Sequence[int]]) -> Iterator[Scored]:
        """Those that are done; `batches` are the rows of all, by number."""
        for atoms in (self._atoms, *self._before):
            for _, parts in atoms.read(ours=atoms is self._atoms):
                with_tensors = parts.get(BATCHES)
                yield from _read(with_tensors.path, batches) if with_tensors else ()

    def write(self, scored: Sequence[Scored]) -> None:
        """Keep these too. Raises SaveError."""
        if not scored:
            return
        tensors = {
            "numbers": torch.tensor([batch.number for batch in scored]),
            "logits": torch.cat([batch.logits for batch in scored]).contiguous(),
        }
        losses = [batch.losses for batch in scored if batch.losses is not None]
        if losses:
            tensors["losses"] = torch.cat(losses).contiguous()
        number = self._numbers[-1] + 1 if self._numbers else 0
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._atoms.write(number, size, lambda folder: save_file(tensors, folder / BATCHES))
        self._numbers.append(number)

    def scores(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `compute` gives, or gave once: metrics of one's own may take long. Raises what `compute` does, and
        SaveError."""
        for _, parts in self._scores.read():
            with contextlib.suppress(KeyError, OSError, ValidationError):
                return _SCORES.validate_json(parts[SCORES].path.read_bytes(), strict=True)
        scores = compute()
        self._scores.write(0, 0, lambda folder: (folder / SCORES).write_text(json.dumps(scores), encoding="utf-8"))
        return scores


def _read(path: Path, batches: Sequence[Sequence[int]]) -> Iterator[Scored]:
    """The batches in a file; none where it is not what `write` makes of this split."""
    try:
        tensors = load_file(path)
        numbers, logits, losses = tensors["numbers"].tolist(), tensors["logits"], tensors.get("losses")
        sizes = [len(batches[number]) for number in numbers]
        parts = logits.split(sizes)
        losses_of = [None] * len(sizes) if losses is None else list(losses.split(sizes))
    except (OSError, KeyError, IndexError, TypeError, RuntimeError, SafetensorError):
        return
    if logits.dtype != torch.float32 or logits.dim() != 2:
        return
    for number, part, each in zip(numbers, parts, losses_of, strict=True):
        yield Scored(number, part, each)
