"""params.yaml: every mistake is one line that says what to write instead."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.config.read import parse_params, read_yaml
from stages.ground.errors import UserError
from tests.support.project import ROOT, Project

GOOD = read_yaml(ROOT / "params.yaml")
STAGES = ("tokenize", "build_loaders", "launch", "train", "evaluate", "select_best")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.lr", 1, "train.learning_rate"),
        ("train.learning_rat", 1, "did you mean learning_rate"),
        ("train.batch_size", 16, "build_loaders.batch_size"),
        ("train.per_device_train_batch_size", 16, "build_loaders.micro_batch_size"),
        ("train.gradient_accumulation_steps", 2, "build_loaders.batch_size"),
        ("train.warmup_ratio", 0.1, "train.warmup_steps"),
        ("train.fp16", True, "train.precision: fp16"),
        ("train.learning_rate", "fast", "a valid number"),
        ("train.learning_rate", -1.0, "greater than 0"),
        ("train.learning_rate", float("inf"), "a finite number"),
        ("train.num_train_epochs", 0, "greater than or equal to 1"),
        ("train.num_train_epochs", True, "a valid integer"),
        ("train.eval_strategy", "never", "'epoch' or 'steps'"),
        ("train.eval_strategy", "steps", "eval_steps must be a number"),
        ("train.eval_steps", 5, "eval_strategy is epoch"),
        ("train.save_steps", 5, "save_strategy is time"),
        ("train.warmup_steps", 1.5, "a share of all steps below 1"),
        ("train.early_stopping_threshold", 0.1, "early_stopping_patience"),
        ("train.init_from_run", "latest", "RUN/step-00000230@1a2b3c4d"),
        ("train.callbacks", [{"klass": "a:B"}], "class"),
        ("train.callbacks", [{"class": "a:B", "args": 1}], "unknown key train.callbacks.0.args"),
        ("train.callbacks", [{"class": "nowhere"}], "callbacks"),
        ("train.callbacks", [{"kwargs": {}}], "train.callbacks.0.class is missing"),
        ("train.loggers", ["mlflow"], "'tensorboard', 'wandb' or 'dvclive'"),
        ("train.loggers", ["wandb", "wandb"], "twice"),
        ("train.loss", "mse", "for classification it should be cross_entropy, bce_with_logits, or module:callable"),
        ("train.loss_kwargs", {"delta": 1.0}, "needs train.loss"),
        ("evaluate.threshold", 1.0, "less than 1"),
        ("data.text_columns", [], "both are empty"),
        ("data.feature_columns", ["x"], "both are given"),
        ("tokenize.tokenizer", 1, "a valid string"),
        ("data.text_columns", ["label"], "named twice"),
        ("data.label_names", ["a", "a"], "a name twice"),
        ("data.config", "mrpc", "needs data.dataset"),
        ("data.validation_size", 1.0, "less than 1"),
        ("build_loaders.micro_batch_size", 5, "does not divide"),
        ("build_loaders.seed", -1, "greater than or equal to 0"),
        ("evaluate.metrics", ["accuracy", "bleu"], "nobody knows"),
        ("evaluate.metrics", ["f1"], "neither loss nor one of evaluate.metrics"),
        ("evaluate.eval_batch_size", 0, "greater than or equal to 1"),
        ("select_best.tie_break", "random", "'earliest' or 'latest'"),
        ("tokenize.max_length", 1, "greater than or equal to 4"),
        ("tokenize.num_proc", 0, "'auto' or greater than or equal to 1"),
        ("tokenize.num_proc", "two", "'auto' or a valid integer"),
        ("tokenize.preprocessing_num_workers", 2, "tokenize.num_proc"),
    ],
)
def test_bad_value_is_one_line_with_the_key_and_what_is_allowed(key: str, value: Any, expected: str) -> None:
    values = copy.deepcopy(GOOD)
    section, name = key.split(".")
    values[section][name] = value
    with pytest.raises(UserError) as error:
        parse_params(values)
    line = str(error.value)
    assert line.startswith("params.yaml: ")
    assert "\n" not in line
    assert name in line
    assert expected in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.task": "regression", "evaluate.metrics": ["mse"]}, "metric_for_best_model"),
        ({"data.task": "regression"}, "'accuracy', which nobody knows for regression; known are mse, mae"),
        ({"data.task": "regression", "data.label_names": ["a", "b"]}, "regression has no classes"),
        ({"data.task": "regression", "train.class_weights": "balanced"}, "train.class_weights is set, but the loss"),
        ({"data.task": "multi_label", "train.loss": "cross_entropy"}, "for multi_label it should be bce_with_logits"),
        ({"data.label_names": ["only"]}, "needs two or more"),
        ({"data.label_names": ["a", "b", "c"], "train.loss": "bce_with_logits"}, "more than two classes"),
        ({"train.loss": "own:loss", "train.label_smoothing": 0.1}, "train.label_smoothing is set, but the loss"),
        ({"train.tf32": True, "train.precision": "bf16"}, "speeds up fp32 only"),
        ({"data.text_columns": [], "data.feature_columns": ["x"]}, "needs a model of your own"),
        ({"model.source": "factory:a:b"}, "brings no tokenizer"),
        (
            {"model.source": "factory:a:b", "data.text_columns": [], "data.feature_columns": ["x"]},
            "build_loaders.bucketing is length",
        ),
        (
            {"evaluate.metrics": ["a:b"], "evaluate.metric_for_best_model": "z"},
            "only you know whether more z is better",
        ),
    ],
)
def test_values_that_contradict_each_other_are_one_line(changes: dict[str, Any], expected: str) -> None:
    values = copy.deepcopy(GOOD)
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    with pytest.raises(UserError) as error:
        parse_params(values)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_key_and_unknown_section_are_named() -> None:
    values = copy.deepcopy(GOOD)
    del values["train"]["seed"]
    with pytest.raises(UserError, match=r"train\.seed is missing"):
        parse_params(values)
    with pytest.raises(UserError, match="unknown section 'training'"):
        parse_params({**GOOD, "training": {}})


def test_every_key_is_commented_in_params_yaml() -> None:
    lines = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if line.startswith("  ") and not line.startswith("  - ")]
    assert [line for line in keys if " # " not in line] == []
    assert len(keys) == sum(len(section) for section in GOOD.values())
    parse_params(GOOD)


@pytest.mark.parametrize("content", ["train: [", "a: 1\na: 2\n", "- a\n"])
def test_broken_yaml_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"params\.yaml") as error:
        parse_params(read_yaml(path))
    assert "\n" not in str(error.value)


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 2e-5\n", encoding="utf-8")
    assert read_yaml(path) == {"a": 2e-5}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_bad_parameters_before_it_loads_anything(project: Project, stage: str) -> None:
    project.write_params(train={"learning_rate": -1})
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}"]
    result = subprocess.run(
        command, cwd=project.folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2
    assert len(lines) == 1
    assert "train.learning_rate is -1" in lines[0]
    assert "| torch\n" not in result.stderr
    assert sorted(path.name for path in project.folder.iterdir()) == ["dvc.yaml", "params.yaml"]


@pytest.mark.parametrize(
    "folder", [".", *sorted(p.parent.as_posix() for p in (ROOT / "examples").glob("*/params.yaml"))]
)
def test_dvc_changes_one_line_of_params_yaml(tmp_path: Path, folder: str) -> None:
    """`dvc exp run -S` writes the whole file."""
    from dvc.utils.hydra import apply_overrides

    before = (ROOT / folder / "params.yaml").read_text()
    parse_params(read_yaml(ROOT / folder / "params.yaml"))
    path = tmp_path / "params.yaml"
    path.write_text(before)
    apply_overrides(path, ["train.seed=7"])
    after = path.read_text()
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert [(a.split()[:2], b.split()[:2]) for a, b in changed] == [(["seed:", "0"], ["seed:", "7"])]
