"""Predictions of a split: the same whenever and however they are computed."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from stages.batches.tokenized import Task
from stages.config.read import read_yaml
from stages.config.schema import TrainParams
from stages.modeling.compute import Compute
from stages.modeling.losses import Objective, make_objective
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.scoring import scorer
from stages.scoring.scorer import Predictions, Scorer, Stopped
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


def predict(model: nn.Module, rows: datasets.Dataset, objective: Objective, size: int, seed: int = 0) -> Predictions:
    compute = Compute(CPU, seed=seed)
    return Scorer(rows, None, objective, size, compute)(Parallel(model, compute))


def test_model_that_draws_in_eval_mode_draws_the_same_each_time() -> None:
    torch.manual_seed(0)
    model, rows = Sampling(), split(50)
    objective = make_objective(train_params(), TASK, rows, CPU)
    torch.manual_seed(1)
    first = predict(model, rows, objective, 16)
    again = predict(model, rows, objective, 16)
    other = predict(model, rows, objective, 16, seed=1)
    assert first.logits.tobytes() == again.logits.tobytes()
    assert first.logits.tobytes() != other.logits.tobytes()


def test_weighted_loss_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(3, 2)), split(50)
    objective = make_objective(train_params(class_weights=[0.3, 0.7]), TASK, rows, CPU)
    losses = [predict(model, rows, objective, size).loss or 0.0 for size in (1, 7, 50)]
    assert max(losses) - min(losses) < 1e-7


class Rank(World):
    """One of several processes, which agrees with itself."""

    def maximum(self, *values: int) -> list[int]:
        return list(values)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_batches_are_those_of_one_process_and_every_process_has_equally_many_passes(size: int) -> None:
    torch.manual_seed(0)
    model, rows = Sampling().eval(), split(50)
    objective = make_objective(train_params(), TASK, rows, CPU)
    scored: dict[int, tuple[list[int], bytes]] = {}
    passes = set()
    for rank in range(size):
        calls: list[int] = []
        compute = Compute(CPU, world=Rank(rank, size))
        parallel = Parallel(model, compute)

        def forward(batch: Any, calls: list[int] = calls, parallel: Parallel = parallel) -> torch.Tensor:
            calls.append(1)
            return parallel.forward(batch)

        for batch in Scorer(rows, None, objective, 7, compute).run(forward, lambda: False):
            assert batch.number not in scored
            scored[batch.number] = batch.rows, batch.logits.numpy().tobytes()
        passes.add(len(calls))
    assert passes == {-(-8 // size)}
    compute = Compute(CPU)
    alone = Scorer(rows, None, objective, 7, compute).run(Parallel(model, compute).forward, lambda: False)
    assert scored == {batch.number: (batch.rows, batch.logits.numpy().tobytes()) for batch in alone}


def test_batches_stay_within_a_window_in_the_order_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "WINDOW_ROWS", 20)
    monkeypatch.setattr(scorer, "lengths", lambda rows: np.arange(50) % 7)
    rows = split(50)
    batches = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 8, Compute(CPU)).batches
    assert [len(batch) for batch in batches] == [8, 8, 4, 8, 8, 4, 8, 2]
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert {row // 20 for row in batches[2]} == {0} and {row // 20 for row in batches[3]} == {1}


def test_prediction_is_left_at_the_next_batch_and_the_model_trains_on() -> None:
    model, rows = Sampling().train(), split(50)
    compute, asked = Compute(CPU), iter([False, False, True])
    predict_rows = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 16, compute)
    with pytest.raises(Stopped):
        predict_rows(Parallel(model, compute), lambda: next(asked))
    assert model.training
