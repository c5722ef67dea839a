"""Evaluation, schedules and devices in small: what does not need a run."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from conftest import ROOT
from own import Sampling
from torch import nn

from stages.batches.tokenized import Task
from stages.config.read import read_yaml
from stages.config.schema import TrainParams
from stages.ground.errors import UserError
from stages.modeling.buffers import remember_buffers
from stages.modeling.device import pick_device
from stages.modeling.losses import make_objective
from stages.scoring.predict import predict
from stages.training.optim import make_optimizer, make_schedule

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


def test_buffers_are_put_back_also_where_forward_replaced_them() -> None:
    model = Sampling()
    put_back = remember_buffers(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model(torch.randn(8, 3))
    assert int(model.calls) == 1
    put_back()
    assert before.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", ["StepLR", "torch.optim.lr_scheduler:StepLR"])
def test_step_lr_counts_epochs_even_where_fp16_skipped_the_last_step(name: str) -> None:
    params = train_params(lr_scheduler_type=name, lr_scheduler_kwargs={"step_size": 1, "gamma": 0.1}, learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), params, CPU)
    schedule = make_schedule(optimizer, params, 10)
    optimizer.step()
    for ends_epoch, skipped, expected in ((False, False, 1.0), (True, True, 0.1), (True, False, 0.01)):
        schedule.after_step(ends_epoch, skipped)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "torch.optim.lr_scheduler:ReduceLROnPlateau"])
def test_plateau_follows_the_validation_loss_alone(name: str) -> None:
    params = train_params(lr_scheduler_type=name, lr_scheduler_kwargs={"patience": 0}, learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), params, CPU)
    schedule = make_schedule(optimizer, params, 10)
    for loss, expected in ((1.0, 1.0), (0.9, 1.0), (0.95, 0.1)):
        schedule.after_step(ends_epoch=True, skipped=False)
        schedule.after_evaluation(loss)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_schedule_of_steps_waits_for_a_skipped_step() -> None:
    params = train_params(lr_scheduler_type="linear", learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), params, CPU)
    schedule = make_schedule(optimizer, params, 10)
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


@pytest.mark.parametrize(
    ("cuda", "name", "local_rank", "expected"),
    [
        (0, "auto", None, "cpu"),
        (0, "auto", 1, "cpu"),
        (0, "cuda", None, "does not have"),
        (0, "tpu", None, "write auto, cpu, cuda"),
        (2, "cpu", 1, "cpu"),
        (2, "cuda:1", 0, "several processes"),
        (2, "auto", 2, "2 visible GPUs"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda:1", None, "cuda:1"),
        (2, "cuda:2", None, "does not have"),
    ],
)
def test_device_is_picked_or_refused(
    monkeypatch: pytest.MonkeyPatch, cuda: int, name: str, local_rank: int | None, expected: str
) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            pick_device(name, local_rank)
    else:
        assert str(pick_device(name, local_rank)) == expected
        assert [str(device) for device in made_current] == [expected] * expected.startswith("cuda")
