"""An `evaluate` module: `evaluate.load("stages/metrics/classification.py", "f1")`, one metric a config name.

`evaluate` reads the imports of this file by pattern, one a line.
"""

import datasets
import evaluate
import numpy as np
import sklearn.metrics

from .ranking import macro_roc_auc

SINGLE = {
    "accuracy": sklearn.metrics.accuracy_score,
    "matthews_correlation": sklearn.metrics.matthews_corrcoef,
}
# Of class 1 for two classes, as in GLUE; the unweighted mean over the classes for more.
OF_CLASS_1_OR_MACRO = {
    "f1": sklearn.metrics.f1_score,
    "precision": sklearn.metrics.precision_score,
    "recall": sklearn.metrics.recall_score,
}
# Over all classes, however many there are.
AVERAGED = {"f1_micro": "micro", "f1_macro": "macro"}


class Classification(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Scores of predicted class ids and probabilities, computed by scikit-learn.",
            citation="",
            inputs_description="predictions and references: class ids; probabilities: float array (rows, classes)",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    # `probabilities` is no feature, so that it does not go through Arrow, which is slow for two dimensions.
    def _compute(self, predictions, references, probabilities):
        predictions, references = np.asarray(predictions), np.asarray(references)
        name, classes = self.config_name, np.arange(probabilities.shape[1])
        positive = classes[1:] if len(classes) == 2 else classes
        if name in SINGLE:
            score = SINGLE[name](references, predictions)
        elif name == "roc_auc":
            score = macro_roc_auc(references[:, None] == positive, probabilities[:, positive])
        elif name in AVERAGED:
            score = sklearn.metrics.f1_score(
                references, predictions, labels=classes, average=AVERAGED[name], zero_division=0.0
            )
        else:
            score = OF_CLASS_1_OR_MACRO[name](
                references, predictions, labels=positive, average="macro", zero_division=0.0
            )
        return {name: float(score)}
