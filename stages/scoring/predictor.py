"""A trained model's predictions as a table a person can read: the raw row beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from stages.batches.tokenized import TOKENIZED, load_raw, load_split, load_task, load_tokenizer
from stages.config.schema import Params
from stages.ground.errors import located
from stages.keeping.folder import threads_of_run
from stages.modeling.build import load_model
from stages.modeling.compute import Compute
from stages.modeling.device import set_threads
from stages.modeling.head import decide
from stages.modeling.losses import make_objective
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.scoring.scorer import Scorer


class Predictor:
    """Predicts splits as train's own evaluation does: same batches, precision and loss."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._compute = Compute.start(params.train, World())
        set_threads(params.train.threads or threads_of_run(torch.get_num_threads()))
        self._task = load_task()
        self._tokenizer = load_tokenizer()
        self._objective = make_objective(params.train, self._task, load_split(TOKENIZED, "train"), self._compute.device)

    def run(self, folder: Path, split: str) -> tuple[pd.DataFrame, dict[str, float]]:
        """Predict `split` with the model in `folder`.

        Returns:
            A row a row of the split: `row` (int64), `key`, the raw inputs by column, `label` and `prediction`
            (classification: int64 class ids; multi_label: lists of the ids of the labels that apply; regression:
            float32; `label` is null in a split without labels), `logits` (list of float32), `loss` (float32, or
            null); and its scores by name, empty without labels.
        """
        evaluate, compute = self._params.evaluate, self._compute
        data = load_split(TOKENIZED, split)
        scorer = Scorer(data, self._tokenizer, self._objective, evaluate.eval_batch_size, compute, split)
        source, kwargs = self._params.model.source, self._params.model.kwargs
        predictions = scorer(Parallel(load_model(folder, compute.device, source, kwargs), compute))
        table = load_raw(TOKENIZED, split).remove_columns([self._task.label_column]).to_pandas()
        labels, task = predictions.labels, self._task.task
        nothing = pd.array([None] * len(table), dtype="Float32")
        prediction = decide(task, predictions.logits, evaluate.threshold)
        table["label"] = nothing if labels is None else _column(labels)
        table["prediction"] = _column(prediction)
        table["logits"] = list(predictions.logits)
        table["loss"] = nothing if labels is None else predictions.row_losses
        with located(f"for the rows of {split}"):
            return table, {} if labels is None else predictions.scores(self._task, evaluate)


def _column(values: NDArray[Any]) -> Any:
    """Class ids or numbers as they are; of 0 and 1 a label, the ids of the labels that apply."""
    return values if values.ndim == 1 else [np.flatnonzero(row) for row in values]
