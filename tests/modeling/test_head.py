"""What logits mean: probabilities and decisions, and that Hugging Face's pipeline reads them the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from stages.batches.tokenized import Task
from stages.ground.errors import UserError
from stages.modeling.head import decide, head_of, probabilities

TEXTS = ["the cat sat on a mat", "good tree was bad", "dog ran under the blue bird", "fine"]


def make_task(task: str, classes: int = 0) -> Task:
    return Task(task, tuple(f"class {i}" for i in range(classes)), ("text",), (), "label", ("input_ids",))


def random_logits(rows: int, outputs: int) -> Any:
    return np.random.default_rng(outputs).normal(0, 3, (rows, outputs)).astype(np.float32)


def test_probabilities_of_classes_are_a_softmax() -> None:
    for outputs in (2, 5):
        logits = random_logits(50, outputs)
        found = probabilities("classification", logits)
        assert found is not None and found.dtype == np.float64
        np.testing.assert_allclose(found, softmax(logits.astype(np.float64), axis=1), rtol=1e-15)


def test_probabilities_of_one_logit_are_those_of_two_classes() -> None:
    logits = random_logits(50, 1)
    found = probabilities("classification", logits)
    assert found is not None and found.shape == (50, 2)
    np.testing.assert_allclose(found[:, 1], expit(logits[:, 0].astype(np.float64)), rtol=1e-15)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    # As two logits, of which the first is 0.
    both = probabilities("classification", np.hstack([np.zeros_like(logits), logits]))
    assert both is not None
    np.testing.assert_allclose(found, both, atol=1e-15)


def test_probabilities_of_labels_are_sigmoids_and_numbers_have_none() -> None:
    for outputs in (1, 4):
        logits = random_logits(50, outputs)
        found = probabilities("multi_label", logits)
        assert found is not None and found.shape == (50, outputs)
        np.testing.assert_allclose(found, expit(logits.astype(np.float64)), rtol=1e-15)
    assert probabilities("regression", random_logits(5, 1)) is None


@pytest.mark.parametrize("threshold", [0.03, 0.5, 0.9])
def test_decisions_are_where_the_probability_is_above_the_threshold(threshold: float) -> None:
    for outputs in (1, 2):
        logits = random_logits(500, outputs)
        scores = probabilities("classification", logits)
        assert scores is not None
        found = decide("classification", logits, threshold)
        assert found.dtype == np.int64
        assert found.tolist() == (scores[:, 1] > threshold).tolist()
        assert 0 < found.sum() < 500
    logits = random_logits(500, 3)
    scores = probabilities("multi_label", logits)
    found = decide("multi_label", logits, threshold)
    assert scores is not None and found.dtype == np.int64
    assert found.tolist() == (scores > threshold).tolist()


def test_decision_among_more_classes_is_the_likeliest_whatever_the_threshold() -> None:
    logits = random_logits(500, 3)
    scores = probabilities("classification", logits)
    assert scores is not None
    for threshold in (0.1, 0.5, 0.9):
        found = decide("classification", logits, threshold)
        assert found.dtype == np.int64
        assert (found == scores.argmax(axis=1)).all()


def test_decision_at_one_half_is_the_larger_logit_and_a_tie_is_class_0() -> None:
    # Probabilities of such logits are 1 and 1, or 0.5 and 0.5, after rounding.
    logits = np.array([[40, 41], [90, 30], [0, 1e-30], [1e-30, 0], [2, 2]], np.float32)
    assert decide("classification", logits, 0.5).tolist() == logits.argmax(axis=1).tolist() == [1, 0, 1, 0, 0]
    assert decide("classification", np.array([[0], [1e-30], [-1e-30]], np.float32), 0.5).tolist() == [0, 1, 0]


def test_decision_in_regression_is_the_number() -> None:
    found = decide("regression", np.array([[1.5], [-2]], np.float32), 0.5)
    assert found.dtype == np.float32 and found.tolist() == [1.5, -2.0]


def test_bce_of_three_classes_is_refused() -> None:
    with pytest.raises(UserError, match="bce_with_logits, but there are 3 classes"):
        head_of(make_task("classification", 3), "bce_with_logits")


@pytest.mark.parametrize(
    ("task", "loss"),
    [
        (make_task("classification", 2), "cross_entropy"),
        (make_task("classification", 3), "cross_entropy"),
        (make_task("classification", 2), "own_losses:focal"),
        (make_task("classification", 2), "bce_with_logits"),
        (make_task("multi_label", 1), "bce_with_logits"),
        (make_task("multi_label", 4), "bce_with_logits"),
        (make_task("regression"), "mse"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.task}-{len(value.label_names)}",
)
def test_pipeline_reads_the_logits_as_probabilities_does(
    task: Task, loss: str, tiny_model: Path, tmp_path: Path
) -> None:
    head = head_of(task, loss)
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_model), **head.config).eval()
    assert model.config.num_labels == head.outputs
    # Logits far enough apart to tell a softmax from a sigmoid, and one class from another.
    torch.nn.init.normal_(model.classifier.weight, std=3)
    for part in (model, tokenizer):
        part.save_pretrained(str(tmp_path))
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]).numpy()
    assert logits.shape == (len(TEXTS), head.outputs)

    classify: Any = pipeline("text-classification", model=str(tmp_path), device="cpu")
    answers = [{found["label"]: found["score"] for found in answer} for answer in classify(TEXTS, top_k=None)]
    scores = probabilities(task.task, logits)
    if scores is None:
        expected: list[Any] = [{"LABEL_0": value} for value in decide(task.task, logits, 0.5).tolist()]
    else:
        expected = [dict(zip(task.label_names, row, strict=True)) for row in scores.tolist()]
        if head.outputs < len(task.label_names):
            # A pipeline says nothing of class 0 when there is one logit.
            expected = [{task.label_names[1]: row[1]} for row in scores.tolist()]
    assert answers == [pytest.approx(row, rel=1e-5) for row in expected]
    if head.config["problem_type"] == "single_label_classification":
        first = [answer["label"] for answer in classify(TEXTS)]
        assert first == [task.label_names[i] for i in decide(task.task, logits, 0.5)]
