"""An `evaluate` module: `evaluate.load("stages/metrics/multi_label.py", "f1_micro")`, one metric a config name.

`evaluate` reads the imports of this file by pattern, one a line.
"""

import datasets
import evaluate
import numpy as np
import sklearn.metrics

from .ranking import macro_roc_auc

# Macro: the unweighted mean over the labels; micro: over all cells of the table alike.
AVERAGED = {
    "f1_micro": (sklearn.metrics.f1_score, "micro"),
    "f1_macro": (sklearn.metrics.f1_score, "macro"),
    "precision": (sklearn.metrics.precision_score, "macro"),
    "recall": (sklearn.metrics.recall_score, "macro"),
}


class MultiLabel(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Scores of predicted labels and their probabilities, computed by scikit-learn. Accuracy is of "
            "rows with every label right; precision, recall and ROC AUC are means over the labels.",
            citation="",
            inputs_description="predictions and references: 0 or 1 for each label of a row; "
            "probabilities: float array (rows, labels)",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    # `probabilities` is no feature, so that it does not go through Arrow, which is slow for two dimensions.
    def _compute(self, predictions, references, probabilities):
        predictions, references = np.asarray(predictions), np.asarray(references)
        name = self.config_name
        if name == "accuracy":
            score = sklearn.metrics.accuracy_score(references, predictions)
        elif name == "roc_auc":
            score = macro_roc_auc(references == 1, probabilities)
        else:
            function, average = AVERAGED[name]
            # A table of one column is to scikit-learn a classification into 0 and 1, of which only 1 is a label.
            labels = [1] if references.shape[1] == 1 else None
            score = function(references, predictions, labels=labels, average=average, zero_division=0.0)
        return {name: float(score)}
