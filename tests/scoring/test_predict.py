"""Predictions of a split: the same whenever and however they are computed."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from stages.scoring.predict import predict
from torch import nn

from stages.batches.tokenized import Task
from stages.config.read import read_yaml
from stages.config.schema import TrainParams
from stages.modeling.losses import make_objective
from tests.support.project import ROOT
from tests.support.user_code import Sampling

CPU = torch.device("cpu")
TASK = Task("classification", ("a", "b"), (), ("x", "y", "z"), "label", ("features",))


def train_params(**changes: Any) -> TrainParams:
    return TrainParams.model_validate(read_yaml(ROOT / "params.yaml")["train"] | {"warmup_steps": 0} | changes)


def split(rows: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    features = {
        "features": datasets.List(datasets.Value("float32"), length=3),
        "labels": datasets.Value("int64"),
    }
    values = {"features": torch.randn(rows, 3, generator=generator).tolist(), "labels": [i % 2 for i in range(rows)]}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def test_model_that_draws_in_eval_mode_draws_the_same_each_time() -> None:
    torch.manual_seed(0)
    model, rows = Sampling(), split(50)
    objective = make_objective(train_params(), TASK, rows, CPU)
    torch.manual_seed(1)
    first = predict(model, rows, None, objective, 16, CPU, "fp32", 0)
    again = predict(model, rows, None, objective, 16, CPU, "fp32", 0)
    other = predict(model, rows, None, objective, 16, CPU, "fp32", 1)
    assert first.logits.tobytes() == again.logits.tobytes()
    assert first.logits.tobytes() != other.logits.tobytes()


def test_weighted_loss_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(3, 2)), split(50)
    objective = make_objective(train_params(class_weights=[0.3, 0.7]), TASK, rows, CPU)
    losses = {predict(model, rows, None, objective, size, CPU, "fp32", 0).loss for size in (1, 7, 50)}
    assert max(losses) - min(losses) < 1e-7  # type: ignore[operator, type-var]
