"""The best models so far, each a folder of its own, until the run publishes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from stages.config.schema import Params
from stages.ground import disk
from stages.ground.places import step_name
from stages.keeping.sealed import MANIFEST, disk_errors, seal, verify
from stages.modeling.build import save_model
from stages.run.checkpoint import CheckpointStore

Candidate = dict[str, Any]
"""`step`: int, `scores`: {name: value}. A list of them is best first."""


class Candidates:
    """The candidates below `folder`; at most `train.keep_candidates` by `evaluate.metric_for_best_model`.

    The list itself is part of the run's state.
    """

    def __init__(self, folder: Path, params: Params) -> None:
        self._folder = folder
        self._params = params
        self._keep = params.train.keep_candidates
        self._metric = params.evaluate.metric_for_best_model
        self._sign = -1.0 if params.evaluate.higher_wins else 1.0
        disk.remove_temporaries(folder)

    def at(self, folder: Path) -> Candidates:
        """The same rules for another run's models."""
        return Candidates(folder, self._params)

    def _rank(self, candidate: Candidate) -> tuple[bool, float, int]:
        value = candidate["scores"][self._metric]
        # NaN last; of equals the earlier one first.
        return value != value, self._sign * value, candidate["step"]

    def add(self, kept: list[Candidate], step: int, scores: dict[str, float], model: nn.Module) -> list[Candidate]:
        """The list with this step's model in its place, if it is good enough; its files are durable by then."""
        best = sorted([*kept, {"step": step, "scores": scores}], key=self._rank)[: self._keep]
        if any(candidate["step"] == step for candidate in best):

            def fill(folder: Path) -> None:
                save_model(model, folder, self._params.model)
                seal(folder, step=step)

            size = sum(p.numel() * p.element_size() for p in model.parameters())
            with disk_errors(self._folder, f"candidate {step_name(step)}", size):
                disk.write_folder(self._folder / step_name(step), fill)
        return best

    def check(self, kept: list[Candidate]) -> None:
        """Raise DamagedError unless every model in the list is as it was written."""
        for candidate in kept:
            verify(self._folder / step_name(candidate["step"]), step=candidate["step"])

    def remove_unused(self, kept: list[Candidate], store: CheckpointStore) -> None:
        """Remove models that neither the run nor a checkpoint on disk refers to. No save may be in flight."""
        lists = [kept, *(progress["candidates"] for progress in store.refers_to("progress"))]
        names = {step_name(candidate["step"]) for candidates in lists for candidate in candidates}
        for path in self._folder.glob("step-*"):
            if path.name not in names:
                disk.remove(path)

    def copy_to(self, folder: Path, kept: list[Candidate]) -> None:
        """Write the models in the list below `folder`, which is replaced as a whole."""

        def fill(target: Path) -> None:
            for candidate in kept:
                name = step_name(candidate["step"])
                shutil.copytree(self._folder / name, target / name, ignore=shutil.ignore_patterns(MANIFEST))

        disk.write_folder(folder, fill)
