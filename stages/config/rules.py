"""What each parameter decides: the one table behind the `params` of dvc.yaml, a run's identity, what
`train.init_from_run` takes over, and what report and card show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stages.config.schema import Params

# `select_best` shows every parameter that decides anything, so each of those decides its report.
SHOWS_ALL = "select_best"


@dataclass(frozen=True)
class Rule:
    """`stages`: those whose own code reads the parameter and whose result it decides, not those that it only
    reaches through an out. `optimizer`: whether an optimizer's state and a position in the plan mean something else
    with another value. `why`: the reason, where a parameter decides nothing."""

    stages: tuple[str, ...] = ()
    optimizer: bool = False
    why: str = ""


_WHEN_SAVED = "when the state is saved never changes the state"

RULES: dict[str, Rule] = {
    "data.path": Rule(("tokenize",)),
    "data.dataset": Rule(("tokenize",)),
    "data.config": Rule(("tokenize",)),
    "data.revision": Rule(("tokenize",)),
    "data.text_columns": Rule(("tokenize",)),
    "data.feature_columns": Rule(("tokenize",)),
    "data.label_column": Rule(("tokenize",)),
    "data.label_separator": Rule(("tokenize",)),
    "data.label_names": Rule(("tokenize",)),
    "data.task": Rule(("tokenize",)),
    "data.validation_size": Rule(("tokenize",)),
    "data.seed": Rule(("tokenize",)),
    "model.source": Rule(("tokenize", "train"), optimizer=True),
    "model.revision": Rule(("tokenize", "train"), optimizer=True),
    "model.kwargs": Rule(("train",), optimizer=True),
    "tokenize.tokenizer": Rule(("tokenize",)),
    "tokenize.max_length": Rule(("tokenize",)),
    "tokenize.pad_token": Rule(("tokenize",)),
    "tokenize.split_special_tokens": Rule(("tokenize",)),
    "tokenize.num_proc": Rule(why="a shard holds the same bytes, whichever process encodes its rows"),
    "build_loaders.batch_size": Rule(("build_loaders",)),
    "build_loaders.micro_batch_size": Rule(("build_loaders",)),
    "build_loaders.bucketing": Rule(("build_loaders",)),
    "build_loaders.drop_last": Rule(("build_loaders",)),
    "build_loaders.seed": Rule(("build_loaders",)),
    "train.num_train_epochs": Rule(("build_loaders", "train")),
    "train.max_steps": Rule(("build_loaders", "train")),
    "train.stop_step": Rule(("train",)),
    "train.learning_rate": Rule(("train",), optimizer=True),
    "train.weight_decay": Rule(("train",), optimizer=True),
    "train.optim": Rule(("train",), optimizer=True),
    "train.optim_kwargs": Rule(("train",), optimizer=True),
    "train.lr_scheduler_type": Rule(("train",), optimizer=True),
    "train.lr_scheduler_kwargs": Rule(("train",), optimizer=True),
    "train.warmup_steps": Rule(("train",)),
    "train.max_grad_norm": Rule(("train",)),
    "train.freeze": Rule(("train",), optimizer=True),
    "train.precision": Rule(("train", "evaluate"), optimizer=True),
    "train.tf32": Rule(("train", "evaluate")),
    "train.compile": Rule(("train",)),
    "train.loss": Rule(("train", "evaluate"), optimizer=True),
    "train.loss_kwargs": Rule(("train", "evaluate"), optimizer=True),
    "train.label_smoothing": Rule(("train", "evaluate"), optimizer=True),
    "train.class_weights": Rule(("train", "evaluate"), optimizer=True),
    "train.eval_strategy": Rule(("train",)),
    "train.eval_steps": Rule(("train",)),
    "train.early_stopping_patience": Rule(("train",)),
    "train.early_stopping_threshold": Rule(("train",)),
    "train.keep_candidates": Rule(("train",)),
    "train.save_strategy": Rule(why=_WHEN_SAVED),
    "train.save_steps": Rule(why=_WHEN_SAVED),
    "train.save_seconds": Rule(why=_WHEN_SAVED),
    "train.hang_seconds": Rule(why="a start that hangs ends, and the next one goes on to the same bits"),
    "train.logging_steps": Rule(("train",)),
    "train.callbacks": Rule(("train",)),
    "train.loggers": Rule(why="they show what the histories hold, beside the outs"),
    "train.num_workers": Rule(why="who collates a batch does not change it"),
    "train.seed": Rule(("train", "evaluate")),
    "train.deterministic": Rule(("train", "evaluate")),
    "train.threads": Rule(("train", "evaluate")),
    "train.device": Rule(why="part of the environment, which is recorded beside the run"),
    "train.launcher": Rule(why="how processes are started; train.reduction says what their number does"),
    "train.reduction": Rule(("train",)),
    "train.init_from_run": Rule(("train",)),
    # The first ones' scores are in the histories and choose candidates: a run that goes on cannot mix two kinds.
    "evaluate.metrics": Rule(("train", "evaluate"), optimizer=True),
    "evaluate.metric_for_best_model": Rule(("train",), optimizer=True),
    "evaluate.greater_is_better": Rule(("train",), optimizer=True),
    "evaluate.eval_batch_size": Rule(("train", "evaluate"), optimizer=True),
    "evaluate.threshold": Rule(("train", "evaluate"), optimizer=True),
    "select_best.tie_break": Rule((SHOWS_ALL,)),
}


def decides(stage: str) -> list[str]:
    """The parameters that decide the result of `stage`, in the table's order."""
    return [key for key, rule in RULES.items() if stage in rule.stages or (stage == SHOWS_ALL and rule.stages)]


def deciding(params: Params, stage: str) -> dict[str, Any]:
    """Those parameters with their values: {"train.seed": 0}."""
    dump = params.model_dump(mode="json", by_alias=True)
    sections = [key.partition(".") for key in decides(stage)]
    return {f"{section}.{key}": dump[section][key] for section, _, key in sections}


def shown(params: Params) -> dict[str, dict[str, Any]]:
    """The parameters that decide anything, by section: what report and card may show."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in deciding(params, SHOWS_ALL).items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key] = value
    return nested
