"""Rows for the plots that DVC draws: `dvc plots show` and `dvc plots diff`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.metrics import precision_recall_curve

from stages.report.text import class_name

NAME_LENGTH = 80
MAX_POINTS = 200


def _plot_names(label_names: list[str]) -> list[str]:
    """One distinct name a class, in id order.

    DVC writes the rows into a `<script>` of its HTML as they are: a label with `</script>` in it would end that.
    """
    names = [class_name(name, NAME_LENGTH).replace("<", "\u2039") for name in label_names]
    return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def confusion_rows(label: Sequence[int], prediction: Sequence[int], label_names: list[str]) -> pd.DataFrame:
    """A row per example for DVC's `confusion` template: the columns `label` and `prediction`, by name.

    `label` and `prediction` are class ids of equal length, without nulls.
    """
    names = _plot_names(label_names)
    return pd.DataFrame({"label": [names[i] for i in label], "prediction": [names[i] for i in prediction]})


def _curve(is_class: NDArray[np.bool_], probability: NDArray[np.float64]) -> pd.DataFrame:
    precision, recall, threshold = precision_recall_curve(is_class, probability)
    kept = np.unique(np.linspace(0, len(threshold) - 1, MAX_POINTS).round().astype(int))
    # Beyond the thresholds scikit-learn adds the point (1, 0), which no threshold reaches: left out.
    return pd.DataFrame({"precision": precision[kept], "recall": recall[kept], "threshold": threshold[kept]})


def precision_recall_rows(
    label: Sequence[int], logits: Sequence[Sequence[float]], label_names: list[str]
) -> pd.DataFrame:
    """Precision-recall curves, each class against the rest: columns precision, recall, threshold, label (its name).

    Of two classes only id 1, the positive one; a class without a row of its own has no curve. `label` holds class
    ids without nulls, `logits` has shape (rows, classes). At most 200 points a class.
    """
    names = _plot_names(label_names)
    labels = np.asarray(label, dtype=np.int64)
    probabilities = softmax(np.asarray(logits, dtype=np.float64).reshape(len(labels), len(names)), axis=1)
    shown = [1] if len(names) == 2 else range(len(names))
    curves = [
        _curve(labels == index, probabilities[:, index]).assign(label=names[index])
        for index in shown
        if (labels == index).any()
    ]
    if not curves:
        return pd.DataFrame(columns=["precision", "recall", "threshold", "label"])
    return pd.concat(curves, ignore_index=True)
