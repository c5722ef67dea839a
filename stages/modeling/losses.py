"""What is minimised: one value a row, and the weight of each row."""

from __future__ import annotations

import inspect
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor, nn

from stages.batches.tokenized import Task, label_batches
from stages.config.imports import import_object
from stages.config.schema import TrainParams, is_custom
from stages.ground.errors import UserError, quote, user_code

if TYPE_CHECKING:
    from stages.tasks.base import RowLoss


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
    return train.loss or task.kind.losses[0]


def make_objective(train: TrainParams, task: Task, train_split: datasets.Dataset, device: torch.device) -> Objective:
    """The loss of `train` for `task`; `train_split` tells how often a class is.

    Raises:
        UserError: train.class_weights does not have a number for each class, or keywords the loss does not take.
    """
    name = loss_name(train, task)
    weights = _class_weights(train.class_weights, task, train_split)
    if is_custom(name):
        return Objective(_custom(name, train.loss_kwargs, device), None)
    with user_code(f"train.loss_kwargs {quote(train.loss_kwargs)} for {name}"):
        kwargs: dict[str, Any] = {
            key: torch.tensor(value, device=device) if isinstance(value, list) or key == "pos_weight" else value
            for key, value in train.loss_kwargs.items()
        }
    if "ignore_index" in kwargs:
        raise UserError("train.loss_kwargs: ignore_index is of no use here, as every row has a label; leave it out")
    loss = task.kind.loss(name, None if weights is None else weights.to(device), train.label_smoothing, kwargs)
    _try_keywords(loss, task, name, train.loss_kwargs, device)
    # Where a row has several labels, a weight is that of a label, not of the row.
    return Objective(loss, None if task.kind.several else weights)


def _try_keywords(loss: RowLoss, task: Task, name: str, kwargs: dict[str, Any], device: torch.device) -> None:
    classes = max(len(task.label_names), 1)
    labels = torch.zeros((1, classes) if task.kind.several else 1, dtype=getattr(torch, task.kind.label_dtype))
    with user_code(f"train.loss_kwargs {quote(kwargs)} for {name}"):
        loss(torch.zeros(1, classes, device=device), labels.to(device))


def _custom(path: str, kwargs: dict[str, Any], device: torch.device) -> RowLoss:
    """The user's `module:callable`, or an instance of it where it is a class, such as one of torch.nn."""
    found = import_object(path, "train.loss")
    if not callable(found):
        raise UserError(f"train.loss is {path}, which is no callable but {type(found).__name__}")
    with user_code(f"train.loss_kwargs {quote(kwargs)} for {path}"):
        function: Any = found(**kwargs) if inspect.isclass(found) else partial(found, **kwargs)
    if isinstance(function, nn.Module):
        if any(True for _ in function.parameters()):
            raise UserError(f"train.loss {path} has parameters, which nothing would train; make them part of the model")
        function.to(device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        before = own_state(function)
        # (rows, 1) against (rows,) would broadcast to (rows, rows) without a word.
        value = function(logits.squeeze(1) if logits.shape[1] == 1 else logits, labels)
        changed = [name for name, found in own_state(function).items() if before.get(name, _NEW) != found]
        if changed:
            raise UserError(
                f"train.loss {path} changes its own {', '.join(changed[:3])} when it is called, which no checkpoint "
                "holds; keep such a state in the model's buffers, or in a callback that has a state_dict"
            )
        if not isinstance(value, Tensor) or value.shape not in ((), labels.shape[:1]):
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"train.loss {path} gives {given} for {len(labels)} rows; "
                "it should give a tensor with a value a row, or a scalar that is their mean"
            )
        return value

    return loss


_NEW = object()


def own_state(function: Any) -> dict[str, Any]:
    """What a loss or model that is an object holds by itself, in a form that tells whether it was changed: tensors by
    their version, so that nothing is copied or waited for. Empty for a function."""
    modules = function.named_modules() if isinstance(function, nn.Module) else [("", function)]
    found: dict[str, Any] = {}
    for prefix, module in modules:
        held = getattr(module, "__dict__", {}) if not isinstance(module, partial) else {}
        buffers = held.get("_buffers", {}) if isinstance(module, nn.Module) else {}
        for name, value in {**held, **buffers}.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{'.' * bool(prefix)}{name}"] = (id(value), value._version)
            elif isinstance(value, str | bool | int | float | None):
                found[f"{prefix}{'.' * bool(prefix)}{name}"] = value if value == value else "nan"
            elif isinstance(value, torch.Generator):
                found[f"{prefix}{'.' * bool(prefix)}{name}"] = value.get_state().tolist()
            elif isinstance(value, list | dict | set | deque):
                found[f"{prefix}{'.' * bool(prefix)}{name}"] = (id(value), len(value))
    return found


def _class_weights(wanted: object, task: Task, train_split: datasets.Dataset) -> Tensor | None:
    """A weight a class; where a row has several labels that of a label's positive rows."""
    if wanted is None:
        return None
    classes = len(task.label_names)
    if isinstance(wanted, list):
        if len(wanted) != classes:
            raise UserError(f"train.class_weights has {len(wanted)} numbers for {classes} classes")
        return torch.tensor(wanted, dtype=torch.float32)
    counts = torch.zeros(classes)
    for labels in label_batches(train_split):
        counts += torch.bincount(labels, minlength=classes) if labels.ndim == 1 else labels.sum(dim=0)
    if task.kind.several:
        weights = (len(train_split) - counts) / counts
        return torch.where(weights > 0, weights, 1.0)  # a label on every row has no negatives to balance
    # As scikit-learn's class_weight="balanced": n_samples / (n_classes * count).
    return counts.sum() / (classes * counts)
