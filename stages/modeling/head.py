"""What a model puts out for a task, and how its logits are read: number of outputs, probabilities, decision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from stages.batches.tokenized import Task
from stages.ground.errors import UserError

Logits = NDArray[np.float32]
"""Shape (rows, outputs)."""


@dataclass(frozen=True)
class Head:
    """The last layer that a task and its loss ask for.

    `outputs`: how many logits a row; `config`: what of it a Hugging Face config says, so that `pipeline` reads the
    logits as `probabilities` does.
    """

    outputs: int
    config: dict[str, Any]


def head_of(task: Task, loss: str) -> Head:
    """The head for `task` trained with `loss`, a name of `stages.config.schema.LOSSES` or a custom one.

    Raises:
        UserError: bce_with_logits for a classification of more than two classes.
    """
    names = task.label_names
    if task.task == "regression":
        return Head(1, {"problem_type": "regression", "num_labels": 1})
    if task.task == "multi_label":
        return Head(len(names), {"problem_type": "multi_label_classification", **_maps(names)})
    if loss == "bce_with_logits":
        if len(names) != 2:
            raise UserError(f"train.loss is bce_with_logits, but there are {len(names)} classes; write cross_entropy")
        # One logit, whose sigmoid is the probability of class 1: to Hugging Face a single label that may apply.
        return Head(1, {"problem_type": "multi_label_classification", **_maps(names[1:])})
    return Head(len(names), {"problem_type": "single_label_classification", **_maps(names)})


def _maps(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def probabilities(task: str, logits: Logits) -> NDArray[np.float64] | None:
    """Probabilities of the classes, float64 (rows, classes); they sum to 1 unless `task` is multi_label. None in
    regression."""
    wide = logits.astype(np.float64)
    if task == "regression":
        return None
    if task == "multi_label":
        return expit(wide)
    if wide.shape[1] == 1:
        positive = expit(wide[:, 0])
        return np.stack([1 - positive, positive], axis=1)
    return softmax(wide, axis=1)


def decide(task: str, logits: Logits, threshold: float) -> NDArray[Any]:
    """What is predicted: class ids, int64 (rows,); in multi_label 0 or 1 for each label, int64 (rows, labels); in
    regression the number, float32 (rows,).

    A label, and class 1 of two, is predicted where its probability is above `threshold`.
    """
    if task == "regression":
        return logits[:, 0]
    # Compared as logits: a sigmoid or softmax would round.
    cut = math.log(threshold) - math.log1p(-threshold)
    wide = logits.astype(np.float64)
    if task == "multi_label":
        return (wide > cut).astype(np.int64)
    if wide.shape[1] == 1:
        return (wide[:, 0] > cut).astype(np.int64)
    if wide.shape[1] == 2:
        return (wide[:, 1] - wide[:, 0] > cut).astype(np.int64)
    return wide.argmax(axis=1)
