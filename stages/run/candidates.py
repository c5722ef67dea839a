"""The best models so far, each an entry of the run's store, until the run publishes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from stages.config.schema import Params
from stages.ground import disk
from stages.ground.places import step_name
from stages.keeping.sealed import DamagedError, FileRecord
from stages.keeping.store import Shelf
from stages.modeling.build import save_model
from stages.run.checkpoint import Checkpoints
from stages.run.dvc_cache import find_in_dvc_cache
from stages.run.state import Candidate, parse_progress
from stages.scoring.ranking import ranked


class Candidates:
    """The candidates on `shelf`; at most `train.keep_candidates` by `evaluate.metric_for_best_model`.

    The list of them, best first, is part of the run's progress.
    """

    def __init__(self, shelf: Shelf, params: Params) -> None:
        self.shelf = shelf
        self._params = params

    def add(self, kept: list[Candidate], step: int, scores: dict[str, float], model: nn.Module) -> list[Candidate]:
        """The list with this step's model in its place, if it is good enough; its files are durable by then. Raises
        SaveError."""
        scored = {candidate.step: candidate.scores for candidate in kept} | {step: scores}
        best = ranked(scored, self._params.evaluate)[: self._params.train.keep_candidates]
        known = {candidate.step: candidate for candidate in kept}
        if step in best:
            known[step] = Candidate(step, scores, self._write(step, model))
        return [known[step] for step in best]

    def _write(self, step: int, model: nn.Module) -> dict[str, FileRecord]:
        store, key = self.shelf.store, self.shelf.key(step)
        store.begin(key, sum(p.numel() * p.element_size() for p in model.parameters()))
        store.put(key, lambda folder: save_model(model, folder, self._params.model))
        return store.commit(key)

    def files(self, candidate: Candidate) -> dict[str, Path]:
        """Its files by name. Raises DamagedError unless they are those that were written."""
        parts = self.shelf.store.read(self.shelf.key(candidate.step))
        if {name: part.record for name, part in parts.items()} != candidate.files:
            raise DamagedError(f"{step_name(candidate.step)}: its files are those of another model")
        return {name: part.path for name, part in parts.items()}

    def ensure(self, candidate: Candidate, say: Callable[[str], None]) -> None:
        """Where its files are damaged, write them anew from what is left and from DVC's cache, each by its content.

        Raises:
            DamagedError: a file is in neither.
            SaveError: it cannot be written.
        """
        try:
            self.files(candidate)
        except DamagedError as error:
            found = {name: self._find(candidate, name) for name in candidate.files}
            files = {name: path for name, path in found.items() if path is not None}
            if len(files) < len(found):
                raise
            self._copy(candidate, files)
            say(f"the candidate of step {candidate.step} was damaged and is restored, at no cost: {error}")

    def _find(self, candidate: Candidate, name: str) -> Path | None:
        left = self.shelf.store.path(self.shelf.key(candidate.step), name)
        with contextlib.suppress(OSError):
            if left.is_file() and disk.sha256_file(left) == candidate.files[name].sha256:
                return left
        return find_in_dvc_cache(candidate.files[name])

    def take_over(self, candidate: Candidate, other: Candidates) -> None:
        """Copy another run's. Raises DamagedError if that is damaged, and SaveError."""
        self._copy(candidate, other.files(candidate))

    def _copy(self, candidate: Candidate, files: dict[str, Path]) -> None:
        def fill(folder: Path) -> None:
            for name, path in files.items():
                disk.copy(path, folder / name)

        store, key = self.shelf.store, self.shelf.key(candidate.step)
        store.begin(key, sum(record.size for record in candidate.files.values()))
        store.put(key, fill)
        store.commit(key)

    def remove_unused(self, kept: Iterable[Candidate], checkpoints: Checkpoints) -> None:
        """Remove models that neither the run nor one of its checkpoints refers to. No save may be in flight."""
        steps = {candidate.step for candidate in kept}
        for progress in checkpoints.peek("progress"):
            with contextlib.suppress(DamagedError):
                steps |= {candidate.step for candidate in parse_progress(progress).candidates}
        self.shelf.remove_but(steps)

    def copy_to(self, folder: Path, kept: Iterable[Candidate]) -> None:
        """Write the models below `folder`, which is replaced as a whole."""

        def fill(target: Path) -> None:
            for candidate in kept:
                place = target / step_name(candidate.step)
                place.mkdir()
                for name, path in self.files(candidate).items():
                    disk.copy(path, place / name)

        disk.write_folder(folder, fill)
