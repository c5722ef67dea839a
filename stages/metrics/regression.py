"""An `evaluate` module: `evaluate.load("stages/metrics/regression.py", "mse")`, one metric a config name.

`evaluate` reads the imports of this file by pattern, one a line.
"""

import datasets
import evaluate
import scipy.stats
import sklearn.metrics

ERRORS = {
    "mse": sklearn.metrics.mean_squared_error,
    "mae": sklearn.metrics.mean_absolute_error,
    "r_squared": sklearn.metrics.r2_score,
}
CORRELATIONS = {"pearsonr": scipy.stats.pearsonr, "spearmanr": scipy.stats.spearmanr}


class Regression(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Scores of predicted numbers, computed by scikit-learn and SciPy.",
            citation="",
            inputs_description="predictions and references: numbers",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references):
        if self.config_name in ERRORS:
            score = ERRORS[self.config_name](references, predictions)
        elif len(references) < 2:
            # SciPy raises where it could answer, as it does for constant numbers, that there is no correlation.
            score = float("nan")
        else:
            score = CORRELATIONS[self.config_name](references, predictions).statistic
        return {self.config_name: float(score)}
