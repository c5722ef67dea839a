"""Before training starts: what would cost a night stops or warns in one line, and nothing of the run changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.project import Checkout
from tests.support.train_stage import TRAIN_OUTS, train

FEATURES: dict[str, dict[str, Any]] = {
    "data": {"text_columns": [], "feature_columns": ["x*"]},
    "build_loaders": {"bucketing": "none", "micro_batch_size": 8},
    "train": {"max_steps": 2, "num_train_epochs": 1},
}


def flawed(prepared: Callable[..., Checkout], flaw: str, **train_params: Any) -> Checkout:
    model = {"source": "factory:stages.custom.own:build_flawed", "kwargs": {"flaw": flaw}}
    return prepared({**FEATURES, "model": model, "train": {**FEATURES["train"], **train_params}})


@pytest.mark.parametrize(
    ("flaw", "expected"),
    [
        ("softmax", "the model ends in a softmax, and the loss applies its own"),
        ("sigmoid", "the model ends in a sigmoid, and the loss applies its own"),
        ("nan", "logits that are infinite or NaN"),
        ("integers", "of type torch.int64; they have to be floats"),
        ("transposed", "logits of shape (2, 8) for 8 rows; the task and loss need (8, 2)"),
        ("raises", "fails on the first batch (features float32 (8, 3)): RuntimeError"),
        ("outside", "saved and built again, the model gives other logits"),
        ("not persistent", "forward changes the buffer seen, which is not persistent"),
        ("asserts", "fails on the first batch (features float32 (8, 3)): AssertionError: seven classes"),
        ("tuple", "forward returns tuple"),
        ("nothing", "forward returns a mapping of a, b"),
        ("frozen", "the loss depends on no parameter that is trained"),
    ],
)
def test_error_stops_before_the_first_step(prepared: Callable[..., Checkout], flaw: str, expected: str) -> None:
    checkout = flawed(prepared, flaw)
    errors = [line for line in train(checkout, code=2).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not list(checkout.folder.glob("runs/*/checkpoints/step-*"))


def test_last_micro_batch_that_the_model_cannot_take_stops(prepared: Callable[..., Checkout]) -> None:
    """84 rows in batches of 83 leave one, of which BatchNorm has no variance."""
    loaders = {"bucketing": "none", "batch_size": 83, "micro_batch_size": 83}
    model = {"source": "factory:stages.custom.own:build_mlp"}
    checkout = prepared({**FEATURES, "model": model, "build_loaders": loaders})
    errors = [line for line in train(checkout, code=2).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "fails on an epoch's last micro-batch, of 1 rows (write build_loaders.drop_last: true" in errors[0]


def test_scalar_loss_that_is_no_mean_is_doubted(prepared: Callable[..., Checkout]) -> None:
    output = train(flawed(prepared, "none", loss="stages.custom.own:sum_loss"))
    assert "a scalar should be the mean over the rows" in output
    assert "warning" not in train(flawed(prepared, "none", loss="stages.custom.own:mean_loss"))


def test_loss_that_cannot_take_the_labels_stops(prepared: Callable[..., Checkout]) -> None:
    checkout = flawed(prepared, "none", loss="torch.nn:BCEWithLogitsLoss")
    errors = [line for line in train(checkout, code=2).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train.loss torch.nn:BCEWithLogitsLoss fails on logits float32 (8, 2) and labels int64 (8,)" in errors[0]


@pytest.mark.parametrize(
    ("flaw", "expected"),
    [
        ("unused", "unused.weight, unused.bias get no gradient"),
        ("hidden sigmoid", "does the model end in a sigmoid?"),
        ("large", "an untrained head gives ln 2 = 0.6931"),
    ],
)
def test_doubt_warns_and_training_goes_on(prepared: Callable[..., Checkout], flaw: str, expected: str) -> None:
    warnings = [line for line in train(flawed(prepared, flaw)).splitlines() if line.startswith("warning: ")]
    assert [expected in line for line in warnings] == [True]


def test_sound_model_is_not_doubted_and_its_first_batch_is_shown(prepared: Callable[..., Checkout]) -> None:
    output = train(prepared({"train": {"max_steps": 2, "num_train_epochs": 1}}))
    assert "warning" not in output
    (first,) = [line for line in output.splitlines() if line.startswith("first batch: ")]
    assert "input_ids int64 (4, " in first
    assert "logits float32 (4, 2), loss 0." in first
    (row,) = [line for line in output.splitlines() if line.startswith("first row: ")]
    assert "[CLS]" in row
    assert "label '" in row


def test_metric_that_fails_is_found_before_training(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared(
        {
            "train": {"max_steps": 2, "num_train_epochs": 1},
            "evaluate": {"metrics": ["accuracy", "stages.custom.own:failing_metrics"]},
        }
    )
    line = train(checkout, code=2).strip().splitlines()[-1]
    assert "no rows of class 7" in line
    assert "failing_metrics" in line


def test_metric_that_fails_on_a_few_rows_alone_is_a_doubt(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared(
        {
            "train": {"max_steps": 2, "num_train_epochs": 1},
            "evaluate": {"metrics": ["accuracy", "stages.custom.own:needs_twenty_rows"], "eval_batch_size": 8},
        }
    )
    output = train(checkout)
    assert re.search(r"fewer than twenty rows \(own.py, line \d+\) \(for 8 of 20 validation rows\)", output)
    assert "rows" in (checkout.folder / "plots/eval.tsv").read_text().splitlines()[0]


# Of `stages/watching`, what is left to import where nobody looks.
BLIND = {
    "preflight": "def preflight(*_):\n    pass\n",
    "loggers": "def make_loggers(*_):\n    return []\n",
    "progress_bar": "from stages.training.callbacks import Callback\n\n\n"
    "class ProgressBar(Callback):\n    def __init__(self, *_):\n        pass\n",
}


@pytest.mark.parametrize(
    "params",
    [
        {"train": {"max_steps": 4, "num_train_epochs": 1}},
        {  # running statistics and dropout
            **FEATURES,
            "model": {"source": "factory:stages.custom.own:build_mlp"},
            "train": {"max_steps": 4, "num_train_epochs": 1},
        },
    ],
)
def test_looking_changes_nothing(prepared: Callable[..., Checkout], params: dict[str, dict[str, Any]]) -> None:
    """`stages/watching` is no part of a run's identity: without all of it, every byte is the same."""
    looked, blind = prepared(params), prepared(params)
    assert "first batch" in train(looked)
    watching = blind.folder / "stages/watching"
    assert {path.stem for path in watching.glob("*.py")} == {*BLIND, "__init__"}
    for name, text in BLIND.items():
        (watching / f"{name}.py").write_text(text)
    output = train(blind)
    assert "4 steps" in output
    assert "first batch" not in output
    assert [run.name for run in blind.runs()] == [run.name for run in looked.runs()]
    assert blind.digests(*TRAIN_OUTS) == looked.digests(*TRAIN_OUTS)
