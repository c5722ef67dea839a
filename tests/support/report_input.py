"""What the tests of the report, the card and the plots are given: predictions and metrics of any task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from stages.batches.tokenized import Task
from stages.modeling.head import decide, head_of
from stages.report.rows import logit_matrix

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>|`*\n---\n\u202egnp\u2066 \x00\x1b[31m \ud800 $\\frac{"
)
HOSTILE_LABELS = (HOSTILE, HOSTILE + "2", "x" * 100_000)
CLASSIFICATION = Task("classification", ("no", "yes"), ("premise", "hypothesis"), (), "label", ("input_ids",))
MULTI_LABEL = replace(CLASSIFICATION, task="multi_label", label_names=("red", "green", "blue"))
REGRESSION = replace(CLASSIFICATION, task="regression", label_names=(), label_column="stars")
PIXELS = tuple(f"pixel_{index}" for index in range(64))
FEATURES = replace(CLASSIFICATION, text_columns=(), feature_columns=PIXELS, model_inputs=("features",))
TASKS = {"classification": CLASSIFICATION, "multi_label": MULTI_LABEL, "regression": REGRESSION, "features": FEATURES}


def predictions(task: Task, rows: int = 40, text: str = "some text", loss: str = "") -> pd.DataFrame:
    """A frame as `Predictor.run` makes it; every fourth row is wrong, and the loss grows with the row."""
    outputs = head_of(task, loss).outputs
    number = np.arange(rows)
    wrong = number % 4 == 0
    frame = pd.DataFrame({"row": number, "key": [f"{row:016x}" for row in number]})
    for column in task.text_columns:
        frame[column] = [f"{column} {row} {text}" for row in number]
    frame = pd.concat([frame, pd.DataFrame(dict.fromkeys(task.feature_columns, number / 3))], axis=1)
    if task.task == "regression":
        label: Any = (number - rows / 2).astype(np.float32)
        logits = np.where(wrong, label - number, label)[:, None]
    elif task.task == "multi_label":
        # Sets of every size, the empty one among them; where wrong, the first label is taken for its absence.
        sets = number[:, None] // 2 ** np.arange(outputs) % 2
        label = [np.flatnonzero(row).tolist() for row in sets]
        logits = np.where(sets ^ (wrong[:, None] & (np.arange(outputs) == 0)), 3.0, -3.0)
    else:
        label = number % len(task.label_names)
        guess = np.where(wrong, (label + 1) % len(task.label_names), label)
        logits = (2 * guess[:, None] - 1) * 3.0 if outputs == 1 else np.eye(outputs)[guess] * 3
    frame = frame.assign(label=label, logits=list(logits.astype(np.float32)), loss=(number / rows).astype(np.float32))
    return frame.assign(prediction=answers(task, frame["logits"]))


def answers(task: Task, logits: pd.Series) -> Any:
    """The column `prediction` that goes with `logits`."""
    decided = decide(task.task, logit_matrix(logits), 0.5)
    return [np.flatnonzero(row).tolist() for row in decided] if task.task == "multi_label" else decided


def report_input(task: Task = CLASSIFICATION, text: str = "some text") -> dict[str, Any]:
    """The arguments of `render_report`."""
    scores = [{"accuracy": 0.70123 + step / 10, "f1": 0.6, "loss": 0.5} for step in range(3)]
    evals = pd.DataFrame([{"step": 10 * i + 10, "epoch": i + 1.0, **score} for i, score in enumerate(scores)])
    steps = np.arange(1, 31)
    labels: dict[str, float] = {name: 40 // len(task.label_names) for name in task.label_names}
    if task.task == "regression":
        labels = {"mean": -0.5, "std": 11.54339, "min": -20.0, "max": 19.0}
    split: dict[str, Any] = {"rows": 40, "labels": labels}
    if task.text_columns:
        split |= {"length": {"p50": 20, "p90": 30, "p99": 40, "max": 64}, "truncated": 1}
    return {
        "best": {
            "step": 30,
            "epoch": 3.0,
            "metric": "accuracy",
            "validation": scores[2],
            "test": scores[1],
            "runner_up": {"step": 20, "value": scores[1]["accuracy"]},
            "reason": f"highest accuracy {text}",
        },
        "candidates": {f"step-{10 * i + 10:08d}": score for i, score in enumerate(scores)},
        "train": pd.DataFrame(
            {"step": steps, "epoch": steps / 10, "loss": 1 / steps, "learning_rate": steps * 1e-6, "grad_norm": 1.0}
        ),
        "evals": evals,
        "data": {
            "train": split,
            "validation": split,
            "test": split,
            "duplicates_across_splits": {"train_validation": 0, "train_test": 0, "validation_test": 0},
        },
        "params": {
            "data": {
                "path": "data/sample",
                "dataset": None,
                "config": None,
                "label_column": text,
                "feature_columns": list(task.feature_columns),
            },
            "model": {"source": "org/model", "kwargs": {"nested": {"dropout": 0.1}}},
            "tokenize": {"max_length": 64},
            "build_loaders": {"batch_size": 16},
            "train": {"learning_rate": 1e-4, "seed": 7, "freeze": [text]},
            "evaluate": {"threshold": 0.5},
        },
        "task": task,
        "validation": predictions(task, text=text),
        "test": predictions(task, text=text),
    }


def hostile_task(name: str) -> Task:
    """A task of `TASKS` whose every name that comes from a data set is hostile."""
    task = replace(TASKS[name], label_column=HOSTILE)
    if task.text_columns:
        task = replace(task, text_columns=(HOSTILE, "text"))
    else:
        task = replace(task, feature_columns=(HOSTILE, "A" * 100_000, *(f"{HOSTILE} {n}" for n in range(62))))
    return task if task.task == "regression" else replace(task, label_names=HOSTILE_LABELS)


def hostile_input(name: str) -> dict[str, Any]:
    """`report_input` with hostile text wherever a user's text can be."""
    given_input = report_input(hostile_task(name), HOSTILE + "A" * 100_000)
    given_input["best"]["validation"][HOSTILE] = 0.5
    given_input["candidates"]["step-00000010"][HOSTILE] = 0.5
    given_input["params"][HOSTILE] = {HOSTILE: HOSTILE}
    given_input["data"]["duplicates_across_splits"][HOSTILE] = 1
    return given_input


def without_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` as `Predictor.run` makes it of a split without labels."""
    nothing = pd.Series([None] * len(frame), dtype="Float32")
    return frame.assign(label=nothing, loss=nothing)


def with_sets(frame: pd.DataFrame, label: list[list[int]], prediction: list[list[int]]) -> pd.DataFrame:
    """A `multi_label` frame with other label sets."""
    return frame.assign(label=pd.Series(label, dtype="object"), prediction=pd.Series(prediction, dtype="object"))
