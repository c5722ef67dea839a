"""What a model puts out for a task, and how its logits are read: number of outputs, probabilities, decision.

Model cards call `decide`, with the name of the task.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.batches.tokenized import Task
from stages.tasks.base import Head
from stages.tasks.registry import KINDS

Logits = NDArray[np.float32]
"""Shape (rows, outputs)."""


def head_of(task: Task, loss: str) -> Head:
    """The head for `task` trained with `loss`, a name of its kind's `losses` or a custom one.

    Raises:
        UserError: a loss for two classes where there are more.
    """
    return task.kind.head(task.label_names, loss)


def probabilities(task: str, logits: Logits) -> NDArray[np.float64] | None:
    """Probabilities of the classes, float64 (rows, classes); they sum to 1 unless `task` is multi_label. None in
    regression."""
    return KINDS[task].probabilities(logits)


def decide(task: str, logits: Logits, threshold: float) -> NDArray[Any]:
    """What is predicted: class ids, int64 (rows,); in multi_label 0 or 1 for each label, int64 (rows, labels); in
    regression the number, float32 (rows,).

    A label, and class 1 of two, is predicted where its probability is above `threshold`.
    """
    return KINDS[task].decide(logits, math.log(threshold) - math.log1p(-threshold))
