"""Optimizers and schedules: what a step changes, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stages.config.read import read_yaml
from stages.config.schema import EvaluateParams, TrainParams
from stages.training.optim import make_optimizer, make_schedule
from tests.support.project import ROOT

CPU = torch.device("cpu")


def train_params(**changes: Any) -> TrainParams:
    return TrainParams.model_validate(read_yaml(ROOT / "params.yaml")["train"] | {"warmup_steps": 0} | changes)


def evaluate_params(**changes: Any) -> EvaluateParams:
    return EvaluateParams.model_validate(read_yaml(ROOT / "params.yaml")["evaluate"] | changes)


@pytest.mark.parametrize("name", ["StepLR", "torch.optim.lr_scheduler:StepLR"])
def test_step_lr_counts_epochs_even_where_fp16_skipped_the_last_step(name: str) -> None:
    params = train_params(lr_scheduler_type=name, lr_scheduler_kwargs={"step_size": 1, "gamma": 0.1}, learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), params, CPU)
    schedule = make_schedule(optimizer, params, 10, evaluate_params())
    optimizer.step()
    for ends_epoch, skipped, expected in ((False, False, 1.0), (True, True, 0.1), (True, False, 0.01)):
        schedule.after_step(ends_epoch, skipped)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "torch.optim.lr_scheduler:ReduceLROnPlateau"])
def test_plateau_follows_the_validation_loss_alone(name: str) -> None:
    params = train_params(lr_scheduler_type=name, lr_scheduler_kwargs={"patience": 0}, learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), params, CPU)
    schedule = make_schedule(optimizer, params, 10, evaluate_params())
    for loss, expected in ((1.0, 1.0), (0.9, 1.0), (0.95, 0.1)):
        schedule.after_step(ends_epoch=True, skipped=False)
        schedule.after_evaluation({"loss": loss, "accuracy": 0.5})
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_schedule_of_steps_waits_for_a_skipped_step() -> None:
    params = train_params(lr_scheduler_type="linear", learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), params, CPU)
    schedule = make_schedule(optimizer, params, 10, evaluate_params())
    optimizer.step()
    schedule.after_step(ends_epoch=False, skipped=True)
    assert optimizer.param_groups[0]["lr"] == 1.0
    schedule.after_step(ends_epoch=False, skipped=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9)


def test_optimizer_is_fused_unless_another_kind_is_asked_for() -> None:
    assert make_optimizer(nn.Linear(2, 2), train_params(), CPU).defaults["fused"]
    assert not make_optimizer(nn.Linear(2, 2), train_params(optim_kwargs={"foreach": True}), CPU).defaults["fused"]


def test_biases_and_norm_weights_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = make_optimizer(model, train_params(weight_decay=0.1), CPU)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {"0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
