"""The objective: what torch says it is, a mean over rows however they are cut, and the same gradient from any cut."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.batches.tokenized import Task
from stages.config.read import read_yaml
from stages.config.schema import TrainParams
from stages.ground.errors import UserError
from stages.modeling.losses import Objective, make_objective
from tests.support.project import ROOT

CPU = torch.device("cpu")
TASKS = {
    "classification": Task("classification", ("a", "b", "c"), ("text",), (), "label", ("input_ids",)),
    "binary": Task("classification", ("a", "b"), ("text",), (), "label", ("input_ids",)),
    "multi_label": Task("multi_label", ("a", "b", "c"), ("text",), (), "label", ("input_ids",)),
    "regression": Task("regression", (), ("text",), (), "label", ("input_ids",)),
}


def objective(name: str, labels: Tensor, **changes: Any) -> Objective:
    values = read_yaml(ROOT / "params.yaml")["train"]
    split = datasets.Dataset.from_dict({"labels": labels.tolist()})
    return make_objective(TrainParams.model_validate(values | changes), TASKS[name], split, CPU)


def sample(name: str, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    outputs = {"classification": 3, "binary": 1, "multi_label": 3, "regression": 1}[name]
    logits = torch.randn(rows, outputs, generator=generator)
    if name == "regression":
        return logits, torch.randn(rows, generator=generator)
    if name == "multi_label":
        return logits, (torch.rand(rows, 3, generator=generator) > 0.6).float()
    return logits, torch.arange(rows) % (2 if name == "binary" else 3)


WEIGHTS = torch.tensor([1.0, 2.0, 5.0])
EXPECTED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "cross entropy": ("classification", {}, nn.CrossEntropyLoss()),
    "weighted cross entropy": ("classification", {"class_weights": [1.0, 2.0, 5.0]}, nn.CrossEntropyLoss(WEIGHTS)),
    "smooth cross entropy": ("classification", {"label_smoothing": 0.2}, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "one logit": ("binary", {"loss": "bce_with_logits"}, lambda x, y: nn.BCEWithLogitsLoss()(x[:, 0], y.float())),
    "multi_label": ("multi_label", {}, nn.BCEWithLogitsLoss()),
    "weighted multi_label": (
        "multi_label", {"class_weights": [1.0, 2.0, 5.0]}, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
    ),
    "pos_weight as a keyword": (
        "multi_label", {"loss": "bce_with_logits", "loss_kwargs": {"pos_weight": [1.0, 2.0, 5.0]}},
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
    ),
    "mse": ("regression", {}, lambda x, y: nn.MSELoss()(x[:, 0], y)),
    "l1": ("regression", {"loss": "l1"}, lambda x, y: nn.L1Loss()(x[:, 0], y)),
    "huber": (
        "regression", {"loss": "huber", "loss_kwargs": {"delta": 0.3}},
        lambda x, y: nn.HuberLoss(delta=0.3)(x[:, 0], y),
    ),
    "class of torch.nn": ("regression", {"loss": "torch.nn:MSELoss"}, lambda x, y: nn.MSELoss()(x[:, 0], y)),
    "a value a row": (
        "classification", {"loss": "tests.support.user_code:focal_loss", "loss_kwargs": {"gamma": 0.0}},
        nn.CrossEntropyLoss(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_objective_is_the_mean_that_torch_gives(name: str) -> None:
    task, changes, reference = EXPECTED[name]
    logits, labels = sample(task)
    made = objective(task, labels, **changes)
    torch.testing.assert_close(
        made.rows(logits, labels).sum() / made.weight(labels), reference(logits, labels), atol=1e-6, rtol=1e-6
    )


def test_weights_of_one_logit_are_those_of_two_logits() -> None:
    logits, labels = sample("binary")
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    for changes in ({"class_weights": [1.0, 3.0]}, {"class_weights": "balanced"}, {"label_smoothing": 0.1}):
        one_logit = objective("binary", labels, loss="bce_with_logits", **changes)
        two_logits = objective("binary", labels, **changes)
        torch.testing.assert_close(one_logit.rows(logits, labels), two_logits.rows(two, labels))
        assert one_logit.weight(labels) == two_logits.weight(labels)


def test_balanced_weights_are_inverse_to_frequency() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 4)
    made = objective("classification", labels, class_weights="balanced")
    assert [made.weight(torch.tensor([i])) for i in range(3)] == pytest.approx([12 / 18, 12 / 6, 12 / 12])
    flags = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 1]])
    several = objective("multi_label", flags, class_weights="balanced")
    expected = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 3.0, 1 / 3]))(torch.ones(4, 3), flags)
    torch.testing.assert_close(several.rows(torch.ones(4, 3), flags).mean(), expected)


def test_scalar_loss_is_read_as_the_mean_over_rows_and_each_row_has_its_own() -> None:
    logits, labels = sample("classification")
    made = objective("classification", labels, loss="tests.support.user_code:mean_loss")
    single = objective("classification", labels).rows(logits, labels)
    torch.testing.assert_close(made.rows(logits, labels), single.mean().expand(12))
    torch.testing.assert_close(made.each_row(logits, labels), single)


@pytest.mark.parametrize("task", ["classification", "binary", "multi_label", "regression"])
@given(cuts=st.sets(st.integers(1, 11)))
@settings(max_examples=15, deadline=None)
def test_gradient_does_not_depend_on_the_cut_into_micro_batches(task: str, cuts: set[int]) -> None:
    changes: dict[str, Any] = {"class_weights": "balanced"} if task != "regression" else {"loss": "huber"}
    changes |= {"loss": "bce_with_logits"} if task == "binary" else {}
    _, labels = sample(task)
    made = objective(task, labels, **changes)
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, {"binary": 1, "regression": 1}.get(task, 3)), torch.randn(12, 4)

    def gradient(bounds: list[int]) -> Tensor:
        model.zero_grad()
        for low, high in itertools.pairwise(bounds):
            rows = made.rows(model(inputs[low:high]), labels[low:high])
            (rows.sum() / made.weight(labels)).backward()
        assert model.weight.grad is not None
        return model.weight.grad.clone()

    torch.testing.assert_close(gradient([0, *sorted(cuts), 12]), gradient([0, 12]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        ("regression", {"loss": "huber", "loss_kwargs": {"beta": 1}}, "beta"),
        ("classification", {"loss": "cross_entropy", "loss_kwargs": {"reduction": "sum"}}, "reduction"),
        ("multi_label", {"loss": "bce_with_logits", "loss_kwargs": {"pos_weight": [1.0, 2.0]}}, "size"),
        ("classification", {"loss": "tests.support.user_code:LearnedLoss"}, "has parameters"),
        ("classification", {"loss": "tests.support.user_code:nothing"}, "cannot be imported"),
        ("classification", {"loss": "torch.nn:CrossEntropyLoss", "loss_kwargs": {"x": 1}}, "unexpected keyword"),
        ("classification", {"class_weights": [1.0]}, "1 numbers for 3 classes"),
    ],
)
def test_loss_that_cannot_be_made_is_one_line(task: str, changes: dict[str, Any], expected: str) -> None:
    _, labels = sample(task)
    with pytest.raises(UserError, match=expected):
        objective(task, labels, **changes)


def test_loss_of_another_shape_is_refused_before_it_broadcasts() -> None:
    logits, labels = sample("classification")
    wrong = objective("classification", labels, loss="tests.support.user_code:a_value_a_class")
    with pytest.raises(UserError, match=r"gives shape \(12, 3\) for 12 rows"):
        wrong.rows(logits, labels)
