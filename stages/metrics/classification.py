"""An `evaluate` module: `evaluate.load("stages/metrics/classification.py", "f1")`, one metric a config name.

`evaluate` reads the imports of this file by pattern, one a line.
"""

import datasets
import evaluate
import sklearn.metrics

SINGLE = {
    "accuracy": sklearn.metrics.accuracy_score,
    "matthews_correlation": sklearn.metrics.matthews_corrcoef,
}
# Of class 1 for two classes, as in GLUE; the unweighted mean over the classes for more.
AVERAGED = {
    "f1": sklearn.metrics.f1_score,
    "precision": sklearn.metrics.precision_score,
    "recall": sklearn.metrics.recall_score,
}


class Classification(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Scores of predicted class ids, computed by scikit-learn.",
            citation="",
            inputs_description="predictions and references: class ids; num_classes: how many there are",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, num_classes):
        if self.config_name in SINGLE:
            score = SINGLE[self.config_name](references, predictions)
        else:
            score = AVERAGED[self.config_name](
                references,
                predictions,
                labels=[1] if num_classes == 2 else list(range(num_classes)),
                average="macro",
                zero_division=0.0,
            )
        return {self.config_name: float(score)}
