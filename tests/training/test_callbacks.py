"""Callbacks: what they may do, when, and what of them a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import pytest

from stages.config.read import read_yaml
from stages.ground.errors import UserError
from stages.run.state import Progress
from stages.training.callbacks import EarlyStopping, make_callbacks
from tests.support.project import Checkout
from tests.support.train_stage import train


class FakeState:
    """As much of TrainState as early stopping looks at."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def stop(self, reason: str) -> None:
        self.reason = reason


def feed(stopper: EarlyStopping, *values: float, losses: Sequence[float] = ()) -> str | None:
    state: Any = FakeState()
    for value, loss in zip_longest(values, losses, fillvalue=1.0):
        stopper.on_evaluate(state, {"accuracy": value, "loss": loss})
    return state.reason


def test_early_stopping_counts_evaluations_without_enough_improvement() -> None:
    assert feed(EarlyStopping("accuracy", True, 2, 0.0), 0.5, 0.6, 0.6, 0.7, 0.7) is None
    assert feed(EarlyStopping("accuracy", True, 2, 0.0), 0.5, 0.4, 0.5) == "no improvement in 2 evaluations"
    assert feed(EarlyStopping("accuracy", True, 1, 0.1), 0.5, 0.59) is not None
    assert feed(EarlyStopping("accuracy", False, 1, 0.0), 0.5, 0.4, 0.3) is None
    assert feed(EarlyStopping("accuracy", False, 1, 0.0), 0.5, 0.6) is not None


def test_early_stopping_never_takes_nan_for_an_improvement() -> None:
    nan = float("nan")
    assert feed(EarlyStopping("accuracy", True, 1, 0.0), nan, nan) is not None
    assert feed(EarlyStopping("accuracy", True, 2, 0.0), nan, 0.1, nan, 0.2) is None


def test_loss_decides_while_the_metric_is_nan_at_every_evaluation() -> None:
    nan = float("nan")
    assert feed(EarlyStopping("accuracy", True, 1, 0.0), nan, nan, nan, losses=(0.9, 0.8, 0.7)) is None
    assert feed(EarlyStopping("accuracy", True, 1, 0.0), nan, nan, losses=(0.9, 0.9)) is not None
    assert feed(EarlyStopping("accuracy", True, 1, 0.0), nan, nan, losses=(nan, nan)) is not None
    assert feed(EarlyStopping("accuracy", True, 1, 0.5), nan, nan, losses=(0.9, 0.8)) is not None
    stopped, resumed = EarlyStopping("accuracy", True, 1, 0.0), EarlyStopping("accuracy", True, 1, 0.0)
    feed(stopped, nan, losses=(0.5,))
    resumed.load_state_dict(stopped.state_dict())
    assert feed(resumed, nan, losses=(0.6,)) is not None


def test_early_stopping_goes_on_counting_after_a_resume() -> None:
    first, resumed = EarlyStopping("accuracy", True, 2, 0.0), EarlyStopping("accuracy", True, 2, 0.0)
    assert feed(first, 0.5, 0.4) is None
    resumed.load_state_dict(first.state_dict())
    assert feed(resumed, 0.5) is not None


def test_a_run_is_complete_at_its_last_step_or_where_a_callback_stopped_it_once_that_is_evaluated() -> None:
    assert Progress(step=10, evaluated_step=10).is_complete(10)
    assert not Progress(step=10, evaluated_step=5).is_complete(10)
    assert Progress(step=5, evaluated_step=5, stop_reason="enough").is_complete(10)
    assert not Progress(step=7, evaluated_step=5, stop_reason="enough").is_complete(10)
    assert not Progress(step=5, evaluated_step=5).is_complete(10)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"class": "tests.support.user_code:Nowhere"}, "cannot be imported"),
        ({"class": "tests.support.user_code:GradientNoise", "kwargs": {"sigma": 1}}, "unexpected keyword"),
        ({"class": "tests.support.user_code:NoCallback"}, "not derived from stages.training.callbacks.Callback"),
    ],
)
def test_callback_that_cannot_be_loaded_is_one_line(entry: dict[str, Any], expected: str) -> None:
    from stages.config.read import parse_params
    from tests.support.project import ROOT

    values = read_yaml(ROOT / "params.yaml")
    values["train"]["callbacks"] = [entry]
    with pytest.raises(UserError, match=expected):
        make_callbacks(parse_params(values))


def with_callbacks(*classes: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    entries = [{"class": f"stages.custom.own:{name}", "kwargs": kwargs} for name in classes]
    return {"train": {"callbacks": entries, "num_train_epochs": 1}}


def test_callback_that_stops_between_evaluations_gets_one_and_the_run_is_complete(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = prepared(with_callbacks("StopAt", step=4))
    train(checkout)
    metrics = json.loads((checkout.folder / "metrics/train.json").read_text())
    assert metrics["stopped_early"]
    assert metrics["steps"] == metrics["best_step"] == 4
    assert "nothing to train" in train(checkout)


def test_gradient_that_a_callback_broke_ends_the_run_before_it_is_in_the_weights(
    prepared: Callable[..., Checkout],
) -> None:
    line = train(prepared(with_callbacks("NotANumber")), code=2).strip().splitlines()[-1]
    assert "NotANumber made a gradient of step 1 infinite or NaN" in line


def test_callback_that_raises_is_one_line_with_its_event_and_step(prepared: Callable[..., Checkout]) -> None:
    line = train(prepared(with_callbacks("Raises")), code=2).strip().splitlines()[-1]
    assert line.startswith("error: Raises.on_step_end at step 1: LookupError: no such file (own.py, line ")


def test_callback_state_that_no_checkpoint_can_hold_is_refused_at_the_start(prepared: Callable[..., Checkout]) -> None:
    line = train(prepared(with_callbacks("UnsavableState")), code=2).strip().splitlines()[-1]
    assert "train.callbacks" in line
    assert "object" in line
    assert "when" in line


def test_callback_is_part_of_the_identity_and_a_logger_is_not(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({"train": {"num_train_epochs": 1}})
    train(checkout)
    params = json.loads((checkout.folder / "params.yaml").read_text())
    params["train"]["loggers"] = ["tensorboard"]
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    assert "nothing to train" in train(checkout)
    params["train"]["callbacks"] = [{"class": "stages.custom.own:StopAt", "kwargs": {"step": 3}}]
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    assert "from the beginning" in train(checkout)
    assert len(checkout.runs()) == 2
