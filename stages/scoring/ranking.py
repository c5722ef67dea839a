"""Which model is better: the same answer for train, which keeps the best, and select_best, which chooses one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stages.config.schema import EvaluateParams


def ranked(scores: Mapping[int, Mapping[str, float]], params: EvaluateParams, tie_break: str = "earliest") -> list[int]:
    """The steps of models, given the scores of each, best first by `params.metric_for_best_model`. NaN comes last, and
    the validation loss decides among those; of equals the earliest or the latest step (`tie_break`).

    Raises KeyError if one does not have the metric.
    """
    sign = -1 if params.higher_wins else 1

    def key(step: int) -> tuple[bool, float, int]:
        value = sign * scores[step][params.metric_for_best_model]
        is_nan = math.isnan(value)
        if is_nan:
            value = scores[step]["loss"]
        return is_nan, math.inf if math.isnan(value) else value, step if tie_break == "earliest" else -step

    return sorted(scores, key=key)
