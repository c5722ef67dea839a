"""What is minimised: one value a row, and the weight of each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.batches.tokenized import Task
from stages.config.imports import import_object
from stages.config.schema import LOSSES, TrainParams, is_custom
from stages.ground.errors import UserError, quote, user_code

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""fp32 logits of shape (rows, outputs) and labels to a value a row (rows,), or a scalar: their mean."""


class Objective:
    """A loss as the mean over rows, weighted where there are class weights, however rows are cut into micro-batches.

    A step's loss is the sum of `rows` over the sum of `weight`, as in `torch.nn.CrossEntropyLoss(weight=...)`.
    """

    def __init__(self, loss: RowLoss, row_weights: Tensor | None) -> None:
        self._loss = loss
        self._row_weights = row_weights

    def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        """fp32 values of the rows, already weighted, shape (rows,); a loss that gives their mean gives it for each."""
        return self._loss(logits.float(), labels).float().expand(len(labels))

    def each_row(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As `rows`, but every row's own value also from a loss that gives a mean."""
        values = self._loss(logits.float(), labels)
        if values.ndim:
            return values.float()
        return torch.cat([self.rows(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])

    def weight(self, labels: Tensor) -> float:
        """The sum of the rows' weights."""
        return float(len(labels) if self._row_weights is None else self._row_weights[labels.cpu()].sum())


def loss_name(train: TrainParams, task: Task) -> str:
    """`train.loss`, or what null stands for."""
    return train.loss or LOSSES[task.task][0]


def make_objective(train: TrainParams, task: Task, train_split: datasets.Dataset, device: torch.device) -> Objective:
    """The loss of `train` for `task`; `train_split` tells how often a class is.

    Raises:
        UserError: train.class_weights does not have a number for each class, or keywords the loss does not take.
    """
    name = loss_name(train, task)
    weights = _class_weights(train.class_weights, task, train_split)
    if is_custom(name):
        return Objective(_custom(name, train.loss_kwargs), None)
    with user_code(f"train.loss_kwargs {quote(train.loss_kwargs)} for {name}"):
        kwargs: dict[str, Any] = {
            key: torch.tensor(value, device=device) if isinstance(value, list) or key == "pos_weight" else value
            for key, value in train.loss_kwargs.items()
        }
    if "ignore_index" in kwargs:
        raise UserError("train.loss_kwargs: ignore_index is of no use here, as every row has a label; leave it out")
    on_device = None if weights is None else weights.to(device)
    smoothing = train.label_smoothing

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, labels, weight=on_device, label_smoothing=smoothing, reduction="none", **kwargs
        )

    def one_logit(logits: Tensor, labels: Tensor) -> Tensor:
        weight = None if on_device is None else on_device[labels]
        return functional.binary_cross_entropy_with_logits(
            logits[:, 0], _smooth(labels.float(), smoothing), weight=weight, reduction="none", **kwargs
        )

    def several_labels(logits: Tensor, labels: Tensor) -> Tensor:
        chosen = kwargs if on_device is None else {"pos_weight": on_device, **kwargs}
        return functional.binary_cross_entropy_with_logits(
            logits, _smooth(labels, smoothing), reduction="none", **chosen
        ).mean(dim=1)

    def numbers(logits: Tensor, labels: Tensor) -> Tensor:
        loss: Any = {"mse": functional.mse_loss, "l1": functional.l1_loss, "huber": functional.huber_loss}[name]
        return loss(logits[:, 0], labels, reduction="none", **kwargs)

    losses: dict[str, RowLoss] = {
        "classification": cross_entropy if name == "cross_entropy" else one_logit,
        "multi_label": several_labels,
        "regression": numbers,
    }
    loss = losses[task.task]
    _try_keywords(loss, task, name, train.loss_kwargs, device)
    return Objective(loss, None if task.task == "multi_label" else weights)


def _smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Targets of 0 and 1 as a mixture with the undecided 0.5: cross entropy's smoothing over two classes."""
    return targets * (1 - smoothing) + smoothing / 2


def _try_keywords(loss: RowLoss, task: Task, name: str, kwargs: dict[str, Any], device: torch.device) -> None:
    classes = max(len(task.label_names), 1)
    labels = {
        "classification": torch.zeros(1, dtype=torch.int64),
        "multi_label": torch.zeros(1, classes),
        "regression": torch.zeros(1),
    }[task.task]
    with user_code(f"train.loss_kwargs {quote(kwargs)} for {name}"):
        loss(torch.zeros(1, classes, device=device), labels.to(device))


def _custom(path: str, kwargs: dict[str, Any]) -> RowLoss:
    """The user's `module:callable`, or an instance of it where it is a class, such as one of torch.nn."""
    found = import_object(path, "train.loss")
    if not callable(found):
        raise UserError(f"train.loss is {path}, which is no callable but {type(found).__name__}")
    with user_code(f"train.loss_kwargs {quote(kwargs)} for {path}"):
        function: Any = found(**kwargs) if inspect.isclass(found) else partial(found, **kwargs)
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        raise UserError(f"train.loss {path} has parameters, which nothing would train; make them part of the model")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        # (rows, 1) against (rows,) would broadcast to (rows, rows) without a word.
        value = function(logits.squeeze(1) if logits.shape[1] == 1 else logits, labels)
        if not isinstance(value, Tensor) or value.shape not in ((), labels.shape[:1]):
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"train.loss {path} gives {given} for {len(labels)} rows; "
                "it should give a tensor with a value a row, or a scalar that is their mean"
            )
        return value

    return loss


def _class_weights(wanted: object, task: Task, train_split: datasets.Dataset) -> Tensor | None:
    """A weight a class; in multi_label that of a label's positive rows."""
    if wanted is None:
        return None
    classes = len(task.label_names)
    if isinstance(wanted, list):
        if len(wanted) != classes:
            raise UserError(f"train.class_weights has {len(wanted)} numbers for {classes} classes")
        return torch.tensor(wanted, dtype=torch.float32)
    counts = torch.zeros(classes)
    for batch in train_split.select_columns(["labels"]).with_format("torch").iter(100_000):
        labels = batch["labels"]
        counts += torch.bincount(labels, minlength=classes) if labels.ndim == 1 else labels.sum(dim=0)
    if task.task == "multi_label":
        weights = (len(train_split) - counts) / counts
        return torch.where(weights > 0, weights, 1.0)  # a label on every row has no negatives to balance
    # As scikit-learn's class_weight="balanced": n_samples / (n_classes * count).
    return counts.sum() / (classes * counts)
