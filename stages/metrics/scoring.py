"""Scores of predictions, by name, through `evaluate`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODULES = Path(__file__).parent


@cache
def _load(task: str, name: str) -> Any:
    # It takes seconds to import, and a run may be killed before its first evaluation.
    import evaluate

    return evaluate.load(str(MODULES / f"{task}.py"), name, keep_in_memory=True)


def score(
    task: str, names: list[str], predictions: NDArray[np.int64], references: NDArray[np.int64], num_classes: int
) -> dict[str, float]:
    """`names` -> score of class ids `predictions` against `references`, both of shape (rows,)."""
    return {
        name: _load(task, name).compute(predictions=predictions, references=references, num_classes=num_classes)[name]
        for name in names
    }
