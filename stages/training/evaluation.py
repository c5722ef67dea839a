"""A model's predictions on a split, and their scores: the same code for train, evaluate and select_best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from stages.config.params import EvaluateParams
from stages.data.collate import make_loader, to_device
from stages.data.store import Task, lengths
from stages.metrics.scoring import score
from stages.training.losses import Objective
from stages.training.precision import autocast
from stages.training.progress import bar_options


class Stopped(Exception):
    """An evaluation was left because the process was asked to stop; nothing of it counts."""


@dataclass(frozen=True)
class Predictions:
    """Row for row of a split: `logits` float32 (rows, classes), `prediction` int64 (rows,), and, unless the split
    has no labels, `labels` int64 (rows,), `row_losses` float32 (rows,) and their (weighted) mean `loss`."""

    logits: NDArray[np.float32]
    prediction: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    row_losses: NDArray[np.float32] | None
    loss: float | None


@torch.no_grad()
def predict(
    model: nn.Module,
    split: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    batch_size: int,
    device: torch.device,
    precision: str,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Predictions:
    """Run `model` over `split` in eval mode, rows of like length together, and give the results in the split's order.

    Raises:
        Stopped: as soon as `stop_requested()` is true at the start of a batch.
    """
    order = np.argsort(-lengths(split), kind="stable")
    rows = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    labelled = "labels" in split.column_names
    logits, labels, losses, weight = [], [], [], 0.0
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(make_loader(split, rows, tokenizer, device, 0), **bar_options("evaluating", "batch")):
            if stop_requested():
                raise Stopped
            inputs = to_device(batch, device)
            targets = inputs.pop("labels") if labelled else None
            with autocast(device, precision):
                output = model(**inputs).logits
            output = output.float()
            logits.append(output.cpu())
            if targets is not None:
                losses.append(objective.rows(output, targets).cpu())
                weight += objective.weight(targets)
                labels.append(targets.cpu())
    finally:
        model.train(was_training)
    back = torch.from_numpy(np.argsort(order))
    all_logits = torch.cat(logits)[back]
    return Predictions(
        all_logits.numpy(),
        all_logits.argmax(-1).numpy(),
        torch.cat(labels)[back].numpy() if labelled else None,
        torch.cat(losses)[back].numpy() if labelled else None,
        # Summed in the split's order and in fp64, so that the batch size plays no part.
        float(torch.cat(losses)[back].double().sum()) / weight if labelled else None,
    )


def score_predictions(predictions: Predictions, task: Task, params: EvaluateParams) -> dict[str, float]:
    """`loss` and every metric of `evaluate.metrics`; the split must have labels."""
    assert predictions.labels is not None and predictions.loss is not None
    scores = score(task.task, params.metrics, predictions.prediction, predictions.labels, len(task.label_names))
    return {"loss": predictions.loss, **scores}
