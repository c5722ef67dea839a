"""What the report shows of a split's predictions: how they agree with the labels, and which are furthest from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.batches.tokenized import Task
from stages.modeling.head import probabilities
from stages.report.figures import (
    MAX_NUMBERED_CLASSES,
    confusion_counts,
    confusion_figure,
    precision_recall_figure,
    scatter_figure,
)
from stages.report.plots import plot_names, precision_recall_rows
from stages.report.rows import by_answer, class_ids, indicators, labelled, numbers
from stages.report.text import class_name, legible

NAME_LENGTH = 60
TEXT_LENGTH = 300
SHOWN_LABELS = 20
SHOWN_MISTAKES = 10
SHOWN_CONFUSIONS = 10
SHOWN_CURVES = 8
SHOWN_OF_A_SET = 8
SHOWN_FEATURES = 6


def number(value: float | None) -> str:
    """A number with six digits; a dash for one that is missing or not a number."""
    return "—" if value is None or math.isnan(value) else f"{value:.6g}"


def outcome(split: str, predictions: pd.DataFrame | None, task: Task) -> dict[str, Any] | None:
    """A split's picture and table; None without labelled rows.

    `picture` is a PNG (or None) and `description` its text; `frequent` are the largest cells of a confusion matrix
    too big for numbers; `per_label` the scores of the most frequent labels, where a row has several, `left_out` how
    many more there are.
    """
    rows = pd.DataFrame() if predictions is None else labelled(predictions)
    if rows.empty:
        return None
    show = by_answer(task.kind, one=_confusion, several=_per_label, number=_scatter)
    return {"split": split, "rows": len(rows), "frequent": [], "per_label": [], "left_out": 0, **show(rows, task)}


def _confusion(rows: pd.DataFrame, task: Task) -> dict[str, Any]:
    names = task.label_names
    counts = confusion_counts(class_ids(rows["label"]), class_ids(rows["prediction"]), len(names))
    return {
        "picture": confusion_figure(counts, names),
        "description": "Confusion matrix",
        "frequent": _frequent_confusions(counts, names) if len(names) > MAX_NUMBERED_CLASSES else [],
    }


def _frequent_confusions(counts: NDArray[np.int64], label_names: Sequence[str]) -> list[dict[str, Any]]:
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    cells = [divmod(int(cell), len(counts)) for cell in largest]
    return [
        {
            "label": class_name(label_names[label], NAME_LENGTH),
            "prediction": class_name(label_names[prediction], NAME_LENGTH),
            "count": int(wrong[label, prediction]),
        }
        for label, prediction in cells
        if wrong[label, prediction]
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _per_label(rows: pd.DataFrame, task: Task) -> dict[str, Any]:
    names = task.label_names
    label, prediction = (indicators(rows[column], len(names)) for column in ("label", "prediction"))
    both, labels, predicted = (matrix.sum(axis=0).tolist() for matrix in (label & prediction, label, prediction))
    order = sorted(range(len(names)), key=lambda index: (-labels[index], index))
    curves, curve_names = precision_recall_rows(rows, task), plot_names(names)
    drawn = [curve_names[index] for index in order[:SHOWN_CURVES] if curve_names[index] in set(curves["label"])]
    return {
        "picture": precision_recall_figure(curves, drawn) if drawn else None,
        "description": "Precision and recall",
        "per_label": [
            {
                "name": class_name(names[index], NAME_LENGTH),
                "rows": labels[index],
                "predicted": predicted[index],
                "precision": _share(both[index], predicted[index]),
                "recall": _share(both[index], labels[index]),
                "f1": _share(2 * both[index], labels[index] + predicted[index]),
            }
            for index in order[:SHOWN_LABELS]
        ],
        "left_out": max(len(names) - SHOWN_LABELS, 0),
    }


def _scatter(rows: pd.DataFrame, task: Task) -> dict[str, Any]:
    picture = scatter_figure(numbers(rows["label"]), numbers(rows["prediction"]))
    return {"picture": picture, "description": "Predictions against labels"}


def mistakes(predictions: pd.DataFrame, task: Task) -> list[dict[str, Any]]:
    """The wrong rows that the model was surest of, by their loss; of numbers those of the largest error.

    Of each: `row`; `inputs`, the raw columns as (name, text or None for null); `more_inputs`, how many columns are not
    among them; `label`, `prediction` and a `note` on it; `loss`.
    """
    rows = labelled(predictions)
    error = _errors(rows, task)
    wrong = error != 0
    size = np.abs(numbers(rows["loss"]) if task.kind.has_classes else error)[wrong]
    # Not a number is the worst a model can say.
    worst = rows[wrong].iloc[np.argsort(-np.where(np.isnan(size), np.inf, size), kind="stable")[:SHOWN_MISTAKES]]
    columns = task.text_columns or task.feature_columns[:SHOWN_FEATURES]
    return [
        {
            "row": row["row"],
            "inputs": [(legible(column, NAME_LENGTH), _input(row[column])) for column in columns],
            "more_inputs": len(task.text_columns or task.feature_columns) - len(columns),
            "label": _answer(row["label"], task),
            "prediction": _answer(row["prediction"], task),
            "note": _note(row, task),
            "loss": row["loss"],
        }
        for row in worst.to_dict("records")
    ]


def _errors(rows: pd.DataFrame, task: Task) -> NDArray[Any]:
    """Per row: 0 where the prediction is right, else how far off it is."""
    label, prediction = rows["label"], rows["prediction"]
    if not task.kind.has_classes:
        return numbers(prediction) - numbers(label)
    if not task.kind.several:
        return (class_ids(label) != class_ids(prediction)).astype(np.int64)
    count = len(task.label_names)
    return (indicators(label, count) ^ indicators(prediction, count)).sum(axis=1)


def _input(value: object) -> str | None:
    # Null is kept apart from the text "None".
    if value is None or value is pd.NA or value != value:
        return None
    return number(value) if isinstance(value, float) else legible(value, TEXT_LENGTH)


def _answer(value: Any, task: Task) -> str:
    if not task.kind.has_classes:
        return number(value)
    if not task.kind.several:
        return class_name(task.label_names[value], NAME_LENGTH)
    names = [class_name(task.label_names[index], NAME_LENGTH) for index in value]
    more = [f"and {len(names) - SHOWN_OF_A_SET} more"] if len(names) > SHOWN_OF_A_SET else []
    return ", ".join(names[:SHOWN_OF_A_SET] + more) or "(none)"


def _note(row: dict[Any, Any], task: Task) -> str:
    """What there is to add to a prediction: its probability, or how far off it is."""
    if task.kind.several:
        return ""
    if not task.kind.has_classes:
        error = row["prediction"] - row["label"]
        return "" if math.isnan(error) else f", off by {error:+.4g}"
    probability = probabilities(task.task, np.asarray([row["logits"]], dtype=np.float32))
    assert probability is not None
    confidence = probability[0, row["prediction"]]
    return "" if math.isnan(confidence) else f" at {confidence:.1%}"
