"""The promise, for whatever people train: killed runs of every task, precision, schedule and kind of model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.project import Checkout
from tests.support.train_stage import EARLY_STOPPING, TRAIN_OUTS, die_at, executed_steps, train

FEATURES: dict[str, dict[str, Any]] = {
    "data": {"text_columns": [], "feature_columns": ["x*"]},
    "model": {"source": "factory:stages.custom.own:build_mlp"},
    "build_loaders": {"bucketing": "none"},
}

CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"train": {}},
    "workers": {"train": {"num_workers": 2}},
    "micro batches of one": {"build_loaders": {"batch_size": 4, "micro_batch_size": 1}, "train": {"max_steps": 20}},
    "plateau": {
        "train": {
            "lr_scheduler_type": "ReduceLROnPlateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
            "warmup_steps": 0,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "keep_candidates": 2,
        }
    },
    "early stopping": EARLY_STOPPING,
    "bf16": {"train": {"precision": "bf16", "lr_scheduler_type": "StepLR", "warmup_steps": 0,
                       "lr_scheduler_kwargs": {"step_size": 1}}},
    "fp16": {"train": {"precision": "fp16", "lr_scheduler_type": "cosine"}},
    "weights and momentum": {
        "train": {
            "class_weights": "balanced",
            "label_smoothing": 0.1,
            "optim": "sgd",
            "optim_kwargs": {"momentum": 0.9},
            "learning_rate": 1e-2,
            "freeze": ["bert.embeddings.*"],
        }
    },
    "one logit": {
        "train": {"loss": "bce_with_logits", "class_weights": [1.0, 2.0], "label_smoothing": 0.1,
                  "optim": "torch.optim:RAdam"},
        "evaluate": {"threshold": 0.4, "metrics": ["accuracy", "f1_macro", "roc_auc"]},
    },
    "multi_label": {
        "data": {"task": "multi_label"},
        "train": {"class_weights": "balanced", "optim": "adafactor", "lr_scheduler_type": "constant"},
        "evaluate": {"metrics": ["f1_micro", "roc_auc"], "metric_for_best_model": "f1_micro"},
    },
    "regression": {
        "data": {"task": "regression"},
        "train": {"loss": "huber", "loss_kwargs": {"delta": 0.5}, "lr_scheduler_type": "ReduceLROnPlateau",
                  "lr_scheduler_kwargs": {"patience": 0}, "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 4},
        "evaluate": {"metrics": ["mse", "pearsonr"], "metric_for_best_model": "mse"},
    },
    "factory on features": {
        **FEATURES,
        "train": {"precision": "bf16", "lr_scheduler_type": "torch.optim.lr_scheduler:CyclicLR", "warmup_steps": 0,
                  "lr_scheduler_kwargs": {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 5}, "num_workers": 1},
    },
    "factory on features, regression": {
        **FEATURES,
        "data": {**FEATURES["data"], "task": "regression"},
        "model": {"source": "factory:stages.custom.own:build_mlp", "kwargs": {"outputs": 1}},
        "train": {"loss": "torch.nn:SmoothL1Loss", "loss_kwargs": {"beta": 0.5}, "optim": "sgd",
                  "optim_kwargs": {"momentum": 0.9, "nesterov": True}},
        "evaluate": {"metrics": ["r_squared", "spearmanr"], "metric_for_best_model": "loss"},
    },
    "draws in eval mode": {**FEATURES, "model": {"source": "factory:stages.custom.own:build_sampling"}},
    "compiled": {**FEATURES, "train": {"compile": True}},
    "factory on text": {
        "model": {"source": "factory:stages.custom.own:build_bag", "kwargs": {"tokens": 200}},
        "tokenize": {"tokenizer": "tiny"},
        "train": {"precision": "fp16", "learning_rate": 1e-2},
    },
    "callbacks, own loss and metrics": {
        "train": {
            "callbacks": [{"class": "stages.custom.own:GradientNoise", "kwargs": {"std": 0.01}},
                          {"class": "stages.custom.own:StopAt", "kwargs": {"step": 17}}],
            "loss": "stages.custom.own:focal_loss",
            "loss_kwargs": {"gamma": 2.0},
        },
        "evaluate": {"metrics": ["stages.custom.own:compute_metrics", "accuracy"], "metric_for_best_model": "errors",
                     "greater_is_better": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_run_ends_with_the_same_bytes(prepared: Callable[..., Checkout], name: str) -> None:
    reference, killed = prepared(CONFIGURATIONS[name]), prepared(CONFIGURATIONS[name])
    operations = reference.folder.parent / "operations"
    train(reference, point=f"count:{operations}")
    count = len(operations.read_text().splitlines())
    generator = random.Random(name)
    points = [f"{generator.choice(['before', 'after'])}:{int(count * generator.uniform(0.15, 0.3))}" for _ in range(2)]
    for point in (*points, r"on:models/\.candidates"):
        die_at(killed, point)
    train(killed)
    assert killed.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)
    steps = executed_steps(killed)
    assert len(steps) == 4
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] > 0
    if name == "early stopping":
        metrics = json.loads((killed.folder / "metrics/train.json").read_text())
        assert metrics["stopped_early"]
        assert metrics["steps"] < 44
