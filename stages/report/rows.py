"""Columns of a predictions frame as arrays; the frame's answers are class ids, lists of them, or numbers, per task."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.tasks.base import Kind

T = TypeVar("T")


def by_answer(kind: Kind, *, one: T, several: T, number: T) -> T:
    """What fits a task whose answer to a row is `one` class, `several` of them, or a `number`."""
    return number if not kind.has_classes else several if kind.several else one


def labelled(predictions: pd.DataFrame) -> pd.DataFrame:
    """The rows with a label; none of a split without labels."""
    return predictions[predictions["label"].notna()]


def class_ids(column: pd.Series) -> NDArray[np.int64]:
    """Class ids, where a row has one, shape (rows,); the column has no nulls."""
    return column.to_numpy(dtype=np.int64)


def numbers(column: pd.Series) -> NDArray[np.float64]:
    """Numbers, shape (rows,); the column has no nulls."""
    return column.to_numpy(dtype=np.float64)


def indicators(column: pd.Series, labels: int) -> NDArray[np.bool_]:
    """Whether a label is in a row's list of them, shape (rows, labels)."""
    result = np.zeros((len(column), labels), dtype=np.bool_)
    for row, ids in zip(result, column, strict=True):
        row[np.asarray(ids, dtype=np.int64)] = True
    return result


def logit_matrix(column: pd.Series) -> NDArray[np.float32]:
    """Shape (rows, outputs); the column has at least one row."""
    return np.stack([np.asarray(logits, dtype=np.float32) for logits in column])
