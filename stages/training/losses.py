"""What is minimised: one value a row, and the weight of each row."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import torch
from torch import Tensor
from torch.nn import functional

from stages.config.errors import UserError
from stages.config.params import TrainParams
from stages.data.store import Task


class Objective:
    """A loss as the mean over rows, weighted where there are class weights, however rows are cut into micro-batches.

    `rows(logits, labels)` gives one fp32 value a row, already weighted, shape (rows,); `weight(labels)` the sum of
    the rows' weights. A step's loss is the sum of the first over the sum of the second, as in
    `torch.nn.CrossEntropyLoss(weight=...)`.
    """

    def __init__(self, rows: Callable[[Tensor, Tensor], Tensor], class_weights: Tensor | None) -> None:
        self._rows = rows
        self._class_weights = class_weights

    def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._rows(logits.float(), labels)

    def weight(self, labels: Tensor) -> float:
        if self._class_weights is None:
            return float(len(labels))
        return float(self._class_weights[labels.cpu()].sum())


def _class_weights(wanted: object, task: Task, train_split: datasets.Dataset) -> Tensor | None:
    if wanted is None:
        return None
    classes = len(task.label_names)
    if isinstance(wanted, list):
        if len(wanted) != classes:
            raise UserError(f"train.class_weights has {len(wanted)} numbers for {classes} classes")
        return torch.tensor(wanted, dtype=torch.float32)
    counts = torch.zeros(classes)
    for batch in train_split.select_columns(["labels"]).with_format("torch").iter(100_000):
        counts += torch.bincount(batch["labels"], minlength=classes)
    # As scikit-learn's class_weight="balanced": n_samples / (n_classes * count).
    return counts.sum() / (classes * counts)


def make_objective(train: TrainParams, task: Task, train_split: datasets.Dataset, device: torch.device) -> Objective:
    """Cross entropy with the label smoothing and class weights of `train`; `train_split` tells how often a class is.

    Raises:
        UserError: train.class_weights does not have a number for each class.
    """
    weights = _class_weights(train.class_weights, task, train_split)
    on_device = None if weights is None else weights.to(device)

    def rows(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, labels, weight=on_device, label_smoothing=train.label_smoothing, reduction="none"
        )

    return Objective(rows, weights)
