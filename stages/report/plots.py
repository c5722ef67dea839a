"""Rows for the plots that DVC draws: `dvc plots show` and `dvc plots diff`.

Every task writes both files. One with a header alone is a plot that DVC leaves out of its page (DVC 3.67, `show` and
`diff` alike); so it is where a task has no such plot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve

from stages.batches.tokenized import Task
from stages.modeling.head import probabilities
from stages.report.rows import class_ids, indicators, labelled, logit_matrix
from stages.report.text import class_name

NAME_LENGTH = 80
MAX_POINTS = 200
# With what a cell begins that a spreadsheet computes, wide forms included.
_FORMULA = re.compile("[=+@\uff1d\uff0b\uff0d\uff20-].")
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)
CURVE_COLUMNS = ["precision", "recall", "threshold", "label"]


def plot_names(label_names: Sequence[str]) -> list[str]:
    """One distinct name a class, in id order.

    DVC writes the rows into a `<script>` of its HTML as they are: a label with `</script>` in it would end that. A
    spreadsheet computes what begins like a formula, unless an apostrophe comes first.
    """
    names = [class_name(name, NAME_LENGTH).replace("<", "\u2039") for name in label_names]
    names = [f"'{name}" if _FORMULA.match(name) and not _NUMBER.fullmatch(name) else name for name in names]
    while len(set(names)) < len(names):  # what is added may be another's name
        names = [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]
    return names


def confusion_rows(predictions: pd.DataFrame, task: Task) -> pd.DataFrame:
    """A row per labelled example for DVC's `confusion` template: the columns `label` and `prediction`, by name.

    No rows unless a row has one class: only there is one taken for another.
    """
    rows = labelled(predictions)
    if task.kind.several or not task.kind.has_classes:
        rows = rows.iloc[:0]
    names = plot_names(task.label_names)
    return pd.DataFrame({column: [names[i] for i in class_ids(rows[column])] for column in ("label", "prediction")})


def _curve(applies: NDArray[np.bool_], probability: NDArray[np.float64]) -> pd.DataFrame:
    precision, recall, threshold = precision_recall_curve(applies, probability)
    kept = np.unique(np.linspace(0, len(threshold) - 1, MAX_POINTS).round().astype(int))
    # Beyond the thresholds scikit-learn adds the point (1, 0), which no threshold reaches: left out.
    return pd.DataFrame({"precision": precision[kept], "recall": recall[kept], "threshold": threshold[kept]})


def precision_recall_rows(predictions: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Precision-recall curves, each label against its absence: columns precision, recall, threshold, label (its name).

    Of two classes only id 1, the positive one; a label without a row of its own has no curve; without classes there is
    none. At most 200 points a label.
    """
    empty = pd.DataFrame(columns=CURVE_COLUMNS)
    rows = labelled(predictions)
    if not task.kind.has_classes or rows.empty:
        return empty
    probability = probabilities(task.task, logit_matrix(rows["logits"]))
    assert probability is not None
    count = len(task.label_names)
    several = task.kind.several
    applies = indicators(rows["label"], count) if several else np.eye(count, dtype=bool)[class_ids(rows["label"])]
    # A model that diverged says NaN, which is on no side of a threshold.
    finite = np.isfinite(probability).all(axis=1)
    probability, applies = probability[finite], applies[finite]
    names = plot_names(task.label_names)
    shown = range(count) if several or count != 2 else [1]
    curves = [
        _curve(applies[:, index], probability[:, index]).assign(label=names[index])
        for index in shown
        if applies[:, index].any()
    ]
    return pd.concat(curves, ignore_index=True) if curves else empty
