"""Metrics that have a name are scikit-learn's and SciPy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from numpy.typing import NDArray

from stages.batches.tokenized import Task
from stages.modeling.head import decide, probabilities
from stages.scoring.scores import score
from tests.support.project import ROOT
from tests.support.tasks import make_params, make_task

KEYWORDS: dict[str, Any] = {"zero_division": 0.0}


def check(task: Task, logits: NDArray[Any], labels: NDArray[Any], expected: dict[str, float], threshold: float) -> None:
    """Every metric of the task, in the reverse order, so that the order is seen to be that of params."""
    names = task.kind.metrics[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(task, make_params(*names, threshold=threshold), logits, labels)
    assert tuple(found) == names
    assert set(expected) == set(names)
    for name in names:
        assert type(found[name]) is float
        assert found[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-15, nan_ok=True), name


def seen_by_scikit_learn(call: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(call(*args, **kwargs))


def of_classes(labels: NDArray[Any], logits: NDArray[Any], threshold: float) -> dict[str, float]:
    scores = probabilities("classification", logits)
    predicted = decide("classification", logits, threshold)
    assert scores is not None
    classes = scores.shape[1]
    averaged: dict[str, Any] = {"labels": range(classes), "average": "macro", **KEYWORDS}
    as_glue = {"pos_label": 1, **KEYWORDS} if classes == 2 else averaged
    present = [c for c in range(classes) if 0 < (labels == c).sum() < len(labels)]
    if not present:
        roc_auc = math.nan
    elif classes == 2:
        roc_auc = sk.roc_auc_score(labels, scores[:, 1])
    elif len(present) == classes:
        roc_auc = sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    else:
        roc_auc = np.mean([sk.roc_auc_score(labels == c, scores[:, c]) for c in present])
    return {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1": sk.f1_score(labels, predicted, **as_glue),
        "f1_micro": sk.f1_score(labels, predicted, **(averaged | {"average": "micro"})),
        "f1_macro": sk.f1_score(labels, predicted, **averaged),
        "precision": sk.precision_score(labels, predicted, **as_glue),
        "recall": sk.recall_score(labels, predicted, **as_glue),
        "matthews_correlation": seen_by_scikit_learn(sk.matthews_corrcoef, labels, predicted),
        "roc_auc": roc_auc,
    }


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (2, 2), (5, 5)])
@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("kind", ["even", "imbalanced", "one class absent", "one class only", "constant predictions"])
def test_classification_is_scikit_learns(classes: int, outputs: int, rows: int, kind: str) -> None:
    random = np.random.default_rng([classes, outputs, rows])
    logits = random.normal(size=(rows, outputs)).astype(np.float32)
    labels = random.integers(0, classes, rows)
    if kind == "imbalanced":
        labels[random.random(rows) < 0.9] = 0
    elif kind == "one class absent":
        labels = random.integers(1, classes, rows)
    elif kind == "one class only":
        labels[:] = 1
    elif kind == "constant predictions":
        logits[:] = logits[0]
    for threshold in (0.5, 0.2):
        expected = of_classes(labels, logits, threshold)
        check(make_task("classification", classes), logits, labels, expected, threshold)


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("kind", ["even", "imbalanced", "one label absent", "no labels", "constant predictions"])
def test_multi_label_is_scikit_learns(count: int, rows: int, kind: str) -> None:
    random = np.random.default_rng([count, rows])
    logits = random.normal(size=(rows, count)).astype(np.float32)
    labels = random.integers(0, 2, (rows, count)).astype(np.float32)
    if kind == "imbalanced":
        labels[random.random((rows, count)) < 0.9] = 0
    elif kind == "one label absent":
        labels[:, 0] = 0
    elif kind == "no labels":
        labels[:] = 0
    elif kind == "constant predictions":
        logits[:] = logits[0]
    scores = probabilities("multi_label", logits)
    assert scores is not None
    for threshold in (0.5, 0.8):
        predicted = (scores > threshold).astype(int)
        # Label by label and in total, so that a single label, and labels in a table, mean the same.
        columns = range(count)
        with_both = [c for c in columns if 0 < labels[:, c].sum() < rows]
        mean = {
            metric: np.mean([metric(labels[:, c], predicted[:, c], **KEYWORDS) for c in columns])
            for metric in (sk.f1_score, sk.precision_score, sk.recall_score)
        }
        aucs = [sk.roc_auc_score(labels[:, c], scores[:, c]) for c in with_both]
        expected = {
            "accuracy": np.mean((labels == predicted).all(axis=1)),
            "f1_micro": sk.f1_score(labels.ravel(), predicted.ravel(), **KEYWORDS),
            "f1_macro": mean[sk.f1_score],
            "precision": mean[sk.precision_score],
            "recall": mean[sk.recall_score],
            "roc_auc": np.mean(aucs) if aucs else math.nan,
        }
        if count > 1:
            assert expected["accuracy"] == sk.accuracy_score(labels, predicted)
            for name, average in (("f1_macro", "macro"), ("f1_micro", "micro")):
                assert expected[name] == pytest.approx(sk.f1_score(labels, predicted, average=average, **KEYWORDS))
        check(make_task("multi_label", count), logits, labels, expected, threshold)


@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("kind", ["noise", "near", "constant predictions", "constant labels"])
def test_regression_is_scikit_learns_and_scipys(rows: int, kind: str) -> None:
    random = np.random.default_rng(rows)
    labels = random.normal(3, 2, rows).astype(np.float32)
    logits = random.normal(3, 2, (rows, 1)).astype(np.float32)
    if kind == "near":
        logits = (labels + random.normal(0, 0.1, rows)).astype(np.float32)[:, None]
    elif kind == "constant predictions":
        logits[:] = 0.25
    elif kind == "constant labels":
        labels[:] = 1.75
    true, predicted = labels.astype(np.float64), logits[:, 0].astype(np.float64)
    undefined = rows == 1 or "constant" in kind
    expected = {
        "mse": sk.mean_squared_error(true, predicted),
        "mae": sk.mean_absolute_error(true, predicted),
        "r_squared": seen_by_scikit_learn(sk.r2_score, true, predicted),
        "pearsonr": math.nan if undefined else scipy.stats.pearsonr(true, predicted)[0],
        "spearmanr": math.nan if undefined else scipy.stats.spearmanr(true, predicted)[0],
    }
    check(make_task("regression"), logits, labels, expected, 0.5)


def test_modules_are_what_evaluate_loads() -> None:
    f1 = evaluate.load(str(ROOT / "stages/metrics/classification.py"), "f1", keep_in_memory=True)
    answer = f1.compute(predictions=[1, 1, 0], references=[1, 0, 0], probabilities=np.zeros((3, 2)))
    assert answer == {"f1": pytest.approx(2 / 3)}
