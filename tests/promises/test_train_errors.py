"""What only training can find out is one line too, before or when it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.project import Checkout
from tests.support.train_stage import SAVES, TRAIN_OUTS, saved_steps, train


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_scheduler_type": "nothing"}, "it should be one of linear"),
        ({"lr_scheduler_type": ":X", "warmup_steps": 0}, "cannot be imported"),
        ({"lr_scheduler_type": "StepLR"}, "has no warm-up"),
        ({"lr_scheduler_type": "StepLR", "warmup_steps": 0, "lr_scheduler_kwargs": {"step_size": 0}}, "StepLR"),
        (
            {"lr_scheduler_type": "ReduceLROnPlateau", "warmup_steps": 0, "lr_scheduler_kwargs": {"factor": 2.0}},
            "Factor",
        ),
        ({"lr_scheduler_type": "stages.training.mine:New", "warmup_steps": 0}, "cannot be imported"),
        ({"optim": "adamw"}, "it should be one of adamw_torch, adam, sgd, adafactor, or module:Class"),
        ({"optim": "torch.optim:Nothing"}, "cannot be imported"),
        ({"optim": "torch.nn:Identity"}, "train.optim_kwargs"),
        ({"loss": "math:pi"}, "train.loss is math:pi, which is no callable"),
        ({"optim_kwargs": {"weight_decay": 0.5}}, "write train.weight_decay"),
        ({"optim_kwargs": {"betas": [0.8]}}, "train.optim_kwargs"),
        (
            {
                "lr_scheduler_type": "torch.optim.lr_scheduler:OneCycleLR",
                "lr_scheduler_kwargs": {"max_lr": 1e-3, "total_steps": 5},
                "warmup_steps": 0,
            },
            "Tried to step 6 times",
        ),
        ({"optim_kwargs": {"beta": 1}}, "train.optim_kwargs"),
        ({"freeze": ["nothing.*"]}, "matches no parameter"),
        ({"freeze": ["*"]}, "leaves no parameter"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "3 numbers for 2 classes"),
        ({"device": "tpu"}, "train.device"),
    ],
)
def test_training_parameter_that_only_a_library_can_judge_is_one_line(
    prepared: Callable[..., Checkout], changes: dict[str, Any], expected: str
) -> None:
    checkout = prepared({"train": {}})
    checkout.set_params({"train": {**SAVES, **changes}})
    lines = [line for line in train(checkout, code=2).splitlines() if not line.startswith("new run")]
    assert len(lines) == 1
    assert expected in lines[0]


def test_code_of_ones_own_that_the_deps_lack_is_refused_with_the_line_to_add(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({"train": {"lr_scheduler_type": "mine:New", "warmup_steps": 0}})
    (checkout.folder / "mine.py").write_text("class New: pass\n")
    output = train(checkout, code=2)
    assert "add the line `- mine.py` under stages.train.deps" in output


LATE_IMPORT = """
import importlib

from stages.training.callbacks import Callback


class Late(Callback):
    def __init__(self, step):
        self.step = step
        if step == 0:
            self.load()

    def load(self):
        importlib.import_module("stages.custom." + "hidden")

    def on_step_end(self, state):
        if state.progress.step == self.step:
            self.load()
"""


@pytest.mark.parametrize("step", [0, 22])
def test_code_imported_by_a_made_up_name_is_refused_and_nothing_published_until_it_is_a_dep(
    prepared: Callable[..., Checkout], step: int
) -> None:
    callbacks = [{"class": "stages.custom.late:Late", "kwargs": {"step": step}}]
    checkout = prepared({"train": {"callbacks": callbacks}})
    (checkout.folder / "stages/custom/late.py").write_text(LATE_IMPORT)
    (checkout.folder / "stages/custom/hidden.py").write_text("X = 1\n")
    last = train(checkout, code=2).strip().splitlines()[-1]
    assert "add the line `- stages/custom/hidden.py` under stages.train.deps" in last
    assert not (checkout.folder / "models").exists()
    # Before the first step where it can be known then.
    assert bool(saved_steps(checkout)) == (step > 0)
    dvc = checkout.folder / "dvc.yaml"
    dvc.write_text(
        dvc.read_text().replace("- stages/launch.py\n", "- stages/launch.py\n      - stages/custom/hidden.py\n")
    )
    train(checkout)
    assert (checkout.folder / "models/candidates").exists()
    assert len(checkout.runs()) == 2


def test_loss_that_is_not_finite_once_costs_nothing(prepared: Callable[..., Checkout]) -> None:
    """Running statistics too are those of the step before."""
    params: dict[str, dict[str, Any]] = {
        "data": {"text_columns": [], "feature_columns": ["x*"]},
        "model": {"source": "factory:stages.custom.own:build_mlp"},
        "build_loaders": {"bucketing": "none"},
        "train": {"loss": "stages.custom.own:nan_once"},
    }
    reference, stopped = prepared(params), prepared(params)
    train(reference)
    # Two micro-batches a step, and two calls in the look before training.
    assert "the loss of step 5 is nan" in train(stopped, code=2, NAN_AT="11")
    assert saved_steps(stopped)[-1] == 4
    assert "going on after step 4" in train(stopped)
    assert stopped.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


def test_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_state_before(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = prepared({"train": {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": None, "warmup_steps": 2}})
    output = train(checkout, code=2)
    step = saved_steps(checkout)[-1]
    last = output.strip().splitlines()[-1]
    assert f"the loss of step {step + 1} is" in last
    assert "the state itself holds NaN, infinity or as good as that" in last
    assert "begin anew with a lower train.learning_rate" in last
    assert not (checkout.folder / "models").exists()
