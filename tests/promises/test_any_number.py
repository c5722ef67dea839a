"""The promise, for any number of processes: killed in four, gone on with in one, three and two, it ends as one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.processes import start_side_by_side, train_in
from tests.support.project import Checkout
from tests.support.train_stage import TRAIN_OUTS, executed_steps, train

# Four micro-batches a step, and fewer in an epoch's last.
SHAPE = {"batch_size": 8, "micro_batch_size": 2}
FEATURES: dict[str, dict[str, Any]] = {
    "data": {"text_columns": [], "feature_columns": ["x*"]},
    "build_loaders": {**SHAPE, "bucketing": "none"},
}
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "classes by weight, in bf16, with dropout and frozen parts": {
        "build_loaders": SHAPE,
        "train": {"precision": "bf16", "class_weights": "balanced", "freeze": ["bert.embeddings.*"],
                  "eval_strategy": "steps", "eval_steps": 5},
    },
    "several labels, in fp16, whose first steps overflow": {
        "data": {"task": "multi_label"},
        "build_loaders": SHAPE,
        "train": {"precision": "fp16", "optim": "adafactor", "loss": "stages.custom.own:huge_loss"},
        "evaluate": {"metrics": ["f1_micro"], "metric_for_best_model": "f1_micro"},
    },
    "a number, with running statistics and a last micro-batch of less": {
        **FEATURES,
        "data": {**FEATURES["data"], "task": "regression"},
        "build_loaders": {**FEATURES["build_loaders"], "batch_size": 15, "micro_batch_size": 3},
        "model": {"source": "factory:stages.custom.own:build_mlp", "kwargs": {"outputs": 1}},
        "train": {"optim": "sgd", "optim_kwargs": {"momentum": 0.9}, "num_train_epochs": 4},
        "evaluate": {"metrics": ["mse"], "metric_for_best_model": "mse"},
    },
    "tied weights, with noise from a callback": {
        "model": {"source": "factory:stages.custom.own:build_bag", "kwargs": {"tokens": 200}},
        "tokenize": {"tokenizer": "tiny"},
        "build_loaders": SHAPE,
        "train": {"learning_rate": 1e-2,
                  "callbacks": [{"class": "stages.custom.own:GradientNoise", "kwargs": {"std": 0.01}}]},
    },
    "compiled": {**FEATURES, "model": {"source": "factory:stages.custom.own:build_mlp"}, "train": {"compile": True}},
    "drawing in eval mode, with a buffer that forward replaces": {
        **FEATURES, "model": {"source": "factory:stages.custom.own:build_sampling"},
    },
}  # fmt: skip


def die_in(processes: int, checkout: Checkout, point: str) -> None:
    """Train in this many processes until the main one kills itself at `point`."""
    for process in start_side_by_side([checkout] * processes, point):
        process.communicate(timeout=300)
        assert process.returncode != 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_number_of_processes_changes_at_every_kill_and_no_byte_does(
    prepared: Callable[..., Checkout], name: str
) -> None:
    reference, killed = prepared(CONFIGURATIONS[name]), prepared(CONFIGURATIONS[name])
    assert ("overflowed" in train(reference)) == ("overflow" in name)
    for processes, step in ((4, 6), (1, 12), (3, 18)):
        die_in(processes, killed, rf"on:checkpoints/\.step-{step:08d}")
    output = train_in(2, killed)
    assert "environment changed" not in output
    assert killed.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)
    assert len(executed_steps(killed)) == 4
    assert executed_steps(killed)[-1] > 0
