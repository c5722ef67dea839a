"""A trained model's predictions as a table a person can read: the raw row beside what was predicted."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from stages.batches.tokenized import TOKENIZED, Task, load_raw, load_split, load_task, load_tokenizer
from stages.config.pipeline import load_stage
from stages.config.schema import Params
from stages.ground.disk import sha256_file
from stages.ground.errors import UserError, located
from stages.ground.places import step_of
from stages.keeping.atoms import Atoms
from stages.keeping.environment import current
from stages.keeping.folder import RunFolder, threads_of_run
from stages.keeping.identity import identify
from stages.keeping.sealed import DamagedError
from stages.modeling.build import load_model
from stages.modeling.compute import Compute
from stages.modeling.device import set_threads
from stages.modeling.head import decide
from stages.modeling.losses import Objective, make_objective
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.scoring.kept import Kept, validation_of
from stages.scoring.scorer import Scorer


class Predictor:
    """Predicts splits as train's own evaluation does: same batches, precision and loss. `environment` is the one that
    it does so in (see stages.keeping.environment)."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._compute = Compute.start(params.train, World())
        set_threads(params.train.threads or threads_of_run(torch.get_num_threads()))
        self.environment = current(self._compute.device)

    @cached_property
    def _task(self) -> Task:
        return load_task()

    @cached_property
    def _objective(self) -> Objective:
        split = load_split(TOKENIZED, "train")
        return make_objective(self._params.train, self._task, split, self._compute.device)

    def run(self, folder: Path, split: str, kept: Kept) -> tuple[pd.DataFrame, dict[str, float]]:
        """Predict `split` with the model in `folder`; `kept` is what is done of that, and will be.

        Returns:
            A row a row of the split: `row` (int64), `key`, the raw inputs by column, `label` and `prediction`
            (classification: int64 class ids; multi_label: lists of the ids of the labels that apply; regression:
            float32; `label` is null in a split without labels), `logits` (list of float32), `loss` (float32, or
            null); and its scores by name, empty without labels.

        Raises:
            UserError: the model, the loss or a metric fails, with the rows.
            SaveError: what is done cannot be kept.
        """
        evaluate, compute = self._params.evaluate, self._compute
        data = load_split(TOKENIZED, split)
        scorer = Scorer(data, load_tokenizer(), self._objective, evaluate.eval_batch_size, compute, split)
        source, kwargs = self._params.model.source, self._params.model.kwargs
        predictions = scorer(lambda: Parallel(load_model(folder, compute.device, source, kwargs)), kept=kept)
        table = load_raw(TOKENIZED, split).remove_columns([self._task.label_column]).to_pandas()
        labels, task = predictions.labels, self._task.task
        nothing = pd.array([None] * len(table), dtype="Float32")
        prediction = decide(task, predictions.logits, evaluate.threshold)
        table["label"] = nothing if labels is None else _column(labels)
        table["prediction"] = _column(prediction)
        table["logits"] = list(predictions.logits)
        table["loss"] = nothing if labels is None else predictions.row_losses
        with located(f"for the rows of {split}"):
            return table, {} if labels is None else kept.scores(lambda: predictions.scores(self._task, evaluate))

    def made_in_training(self, folder: Path) -> list[Atoms]:
        """The predictions of the validation split that train's evaluation made with the very model in `folder`, if
        they are those that it would make here; they need not be made again then.

        They depend on nothing that evaluate's deps do not hold: the run's identity covers parameters, rows and code,
        and the model's files are compared.
        """
        run, step = self._run_of_training, step_of(folder.name)
        atoms = run.atoms(validation_of(step)) if run is not None else None
        if run is None or atoms is None or not atoms.numbers():
            return []
        try:
            model = run.store.read(run.candidates.key(step))
        except DamagedError:
            return []
        files = {path.name: path for path in folder.iterdir()}
        same = files.keys() == model.keys() and all(
            sha256_file(path) == model[name].record.sha256 for name, path in files.items()
        )
        return [atoms] if same else []

    @cached_property
    def _run_of_training(self) -> RunFolder | None:
        """The run of train that parameters and files as they are now lead to, if its environment is this one."""
        params = self._params.train
        if params.compile or not params.deterministic:
            return None  # another forward pass than that of a model that was loaded
        try:
            run = RunFolder.of(identify(load_stage("train")))
        except UserError:
            return None
        # One process after those of the run: a batch's predictions are the same in any number of them.
        there = {key: value for key, value in run.environment().items() if key not in ("world_size", "environments")}
        return run if self.environment == there else None


def _column(values: NDArray[Any]) -> Any:
    """Class ids or numbers as they are; of 0 and 1 a label, the ids of the labels that apply."""
    return values if values.ndim == 1 else [np.flatnonzero(row) for row in values]
