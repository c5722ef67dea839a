"""Tasks and the parameters of their evaluation, as the scoring room is given them."""

from __future__ import annotations

from stages.batches.tokenized import Task
from stages.config.schema import EvaluateParams


def make_task(task: str, classes: int = 0) -> Task:
    return Task(task, tuple(f"class {i}" for i in range(classes)), ("text",), (), "label", ("input_ids",))


def make_params(*metrics: str, best: str = "loss", threshold: float = 0.5) -> EvaluateParams:
    return EvaluateParams(
        metrics=list(metrics),
        metric_for_best_model=best,
        greater_is_better=None if best == "loss" else True,
        eval_batch_size=8,
        threshold=threshold,
    )
