"""How well scores rank rows, for the `evaluate` modules beside this file."""

import numpy as np
import sklearn.metrics
from numpy.typing import NDArray


def macro_roc_auc(outcomes: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """The mean ROC AUC of the columns of `scores` for those of `outcomes`, both (rows, columns).

    Columns without both outcomes have none and are left out; NaN if that leaves no column.
    """
    aucs = [
        sklearn.metrics.roc_auc_score(outcome, score)
        for outcome, score in zip(outcomes.T, scores.T, strict=True)
        if outcome.any() and not outcome.all()
    ]
    return float(np.mean(aucs))
