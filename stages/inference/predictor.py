"""A trained model's predictions as a table a person can read: the raw row beside what was predicted."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stages.config.params import Params
from stages.data.store import TOKENIZED, load_raw, load_split, load_task, load_tokenizer
from stages.modeling.build import load_model
from stages.modeling.device import pick_device, set_determinism
from stages.training.evaluation import predict, score_predictions
from stages.training.losses import make_objective


class Predictor:
    """Predicts splits as train's own evaluation does: same batches, precision and loss."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._device = pick_device(params.train.device)
        set_determinism(params.train.deterministic)
        self._task = load_task()
        self._tokenizer = load_tokenizer()
        self._objective = make_objective(params.train, self._task, load_split(TOKENIZED, "train"), self._device)

    def run(self, folder: Path, split: str) -> tuple[pd.DataFrame, dict[str, float]]:
        """Predict `split` with the model in `folder`.

        Returns:
            A row a row of the split: `row` (int64), `key`, the raw text columns, `label` and `prediction` (int64
            class ids; `label` is null in a split without labels), `logits` (list of float32), `loss` (float32, or
            null); and its scores by name, empty without labels.
        """
        data = load_split(TOKENIZED, split)
        evaluate = self._params.evaluate
        predictions = predict(
            load_model(folder, self._device),
            data,
            self._tokenizer,
            self._objective,
            evaluate.eval_batch_size,
            self._device,
            self._params.train.precision,
        )
        table = load_raw(TOKENIZED, split).remove_columns([self._task.label_column]).to_pandas()
        labelled = predictions.labels is not None
        table["label"] = predictions.labels if labelled else pd.array([None] * len(table), dtype="Int64")
        table["prediction"] = predictions.prediction
        table["logits"] = list(predictions.logits)
        table["loss"] = predictions.row_losses if labelled else pd.array([None] * len(table), dtype="Float32")
        return table, score_predictions(predictions, self._task, evaluate) if labelled else {}
