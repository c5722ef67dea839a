"""The one place that says which parameters exist and what each may be.

Names are those of Hugging Face `TrainingArguments` where one exists. Nothing heavy is imported here, so a
typo is reported before torch is loaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from stages.ground.errors import quote
from stages.tasks.base import Kind
from stages.tasks.registry import KINDS

# By name, of every task; `loss` is always there for metric_for_best_model.
KNOWN_METRICS = {"loss", *(name for kind in KINDS.values() for name in kind.metrics)}
LOWER_IS_BETTER = {"loss", *(name for kind in KINDS.values() for name in kind.lower_is_better)}
FACTORY = "factory:"
# A run's checkpoint, by its content. The run alone is refused later, with the line to write.
INIT_FROM_RUN = re.compile(r"[0-9a-f]{12}(/step-[0-9]{8,}@[0-9a-f]{8})?")


def is_custom(name: str) -> bool:
    """Whether a loss or metric is the user's own: `module:callable`, or the folder of an `evaluate` module."""
    return ":" in name or "/" in name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords that JSON holds, as identities, checkpoints and models/ do; a NaN would differ from itself."""
    for name, value in kwargs.items():
        todo = [value]
        while todo:
            value = todo.pop()
            if isinstance(value, dict):
                todo += [*value, *value.values()]
            elif isinstance(value, list):
                todo += value
            elif value != value or not isinstance(value, str | bool | int | float | None):
                raise ValueError(
                    f"the keyword {quote(name)} holds {quote(value)}; it should be text (in quotes), a number, true, "
                    "false, null, or lists and mappings of these"
                )
    return kwargs


# What 64 bits hold: numbers of rows and steps are counted in such.
PositiveInt = Annotated[int, Field(ge=1, le=2**63 - 1)]
# Rows of one batch: as many tokens have no address.
Rows = Annotated[int, Field(ge=1, le=2**31 - 1)]
Kwargs = Annotated[dict[str, Any], AfterValidator(_plain)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _without_nul(name: str) -> str:
    if "\0" in name:
        raise ValueError(f"{quote(name)} holds a NUL, which no path or column has")
    return name


def _possible_path(name: str) -> str:
    """A name that may be a path: what a disk, or the system that looks for a home folder, fails on is no name."""
    if any(len(os.fsencode(part)) > 255 for part in name.split("/")) or len(os.fsencode(name)) > 4095:
        raise ValueError(f"{quote(name)} is longer than any path")
    try:
        Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"{quote(name)}: there is no such user; write the whole path") from None
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Place = Annotated[Name, AfterValidator(_possible_path)]


class DataParams(Section):
    path: Place
    dataset: Name | None
    config: Name | None
    revision: Name | None
    text_columns: Annotated[list[Name], Field(max_length=2)]
    feature_columns: list[Name]
    label_column: Name
    label_separator: Name
    label_names: Annotated[list[Name], Field(min_length=1)] | None
    task: Literal[tuple(KINDS)]  # type: ignore[valid-type]
    validation_size: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed

    @model_validator(mode="after")
    def _consistent(self) -> DataParams:
        if self.path.startswith("~"):
            raise ValueError(f"data.path is {quote(self.path)}, but DVC knows no ~; write the whole path")
        if self.dataset is None and (self.config or self.revision):
            key = "config" if self.config else "revision"
            raise ValueError(f"data.{key} needs data.dataset (a Hub id); it says nothing about data.path")
        if bool(self.text_columns) == bool(self.feature_columns):
            found = "both are given" if self.text_columns else "both are empty"
            raise ValueError(
                f"data.text_columns and data.feature_columns: {found}; name the columns of one, [] for the other"
            )
        columns = [*self.text_columns, *self.feature_columns, self.label_column]
        for column in columns:
            if columns.count(column) > 1:
                raise ValueError(
                    f"column {quote(column)} is named twice in text_columns, feature_columns and label_column"
                )
        if self.label_names and not self.kind.has_classes:
            raise ValueError(f"data.label_names is set, but data.task {self.task} has no classes; write null")
        if self.label_names and len(self.label_names) < self.kind.fewest_classes:
            raise ValueError(f"data.label_names has one name; {self.task} needs two or more")
        if self.label_names and len(set(self.label_names)) != len(self.label_names):
            raise ValueError("data.label_names has a name twice; every class needs its own")
        return self

    @property
    def kind(self) -> Kind:
        return KINDS[self.task]


class ModelParams(Section):
    source: Place
    revision: Name | None
    kwargs: Kwargs


class TokenizeParams(Section):
    tokenizer: Place | None
    max_length: Annotated[int, Field(ge=4, le=2**31 - 1)]
    pad_token: Name | None
    split_special_tokens: bool | None
    num_proc: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]


class BuildLoadersParams(Section):
    batch_size: Rows
    micro_batch_size: Rows
    bucketing: Literal["none", "length"]
    drop_last: bool
    seed: Seed

    @model_validator(mode="after")
    def _divides(self) -> BuildLoadersParams:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"build_loaders.batch_size is {self.batch_size}, which micro_batch_size "
                f"{self.micro_batch_size} does not divide; choose a divisor of {self.batch_size}"
            )
        return self

    @property
    def micro_batches_per_step(self) -> int:
        """Of a whole step; an epoch's last may have fewer."""
        return self.batch_size // self.micro_batch_size


class CallbackParams(Section):
    class_: Annotated[str, Field(alias="class", pattern=r"^[\w.]+:\w+$")]
    kwargs: Kwargs = {}


class TrainParams(Section):
    num_train_epochs: PositiveInt
    max_steps: PositiveInt | None
    stop_step: PositiveInt | None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: NonNegativeFloat
    optim: Name
    optim_kwargs: Kwargs
    lr_scheduler_type: Name
    lr_scheduler_kwargs: Kwargs
    warmup_steps: NonNegativeFloat
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    freeze: list[Name]
    precision: Literal["fp32", "bf16", "fp16"]
    tf32: bool
    compile: bool
    loss: Name | None
    loss_kwargs: Kwargs
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    class_weights: (
        Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
        | Literal["balanced"]
        | None
    )
    eval_strategy: Literal["epoch", "steps"]
    eval_steps: PositiveInt | None
    early_stopping_patience: PositiveInt | None
    early_stopping_threshold: NonNegativeFloat
    keep_candidates: PositiveInt
    save_strategy: Literal["time", "steps", "epoch"]
    save_steps: PositiveInt | None
    save_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    hang_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    logging_steps: PositiveInt
    callbacks: list[CallbackParams]
    loggers: list[Literal["tensorboard", "wandb", "dvclive"]]
    num_workers: Annotated[int, Field(ge=0, le=2**31 - 1)]
    seed: Seed
    deterministic: bool
    device: Name
    launcher: Name
    reduction: Literal["exact", "fast"]
    threads: PositiveInt | None
    init_from_run: Name | None

    @model_validator(mode="after")
    def _consistent(self) -> TrainParams:
        for what in ("eval", "save"):
            strategy, steps = getattr(self, f"{what}_strategy"), getattr(self, f"{what}_steps")
            if strategy == "steps" and steps is None:
                raise ValueError(f"train.{what}_strategy is steps, so train.{what}_steps must be a number, not null")
            if strategy != "steps" and steps is not None:
                raise ValueError(
                    f"train.{what}_steps is {steps} but train.{what}_strategy is {strategy}; "
                    f"write {what}_strategy: steps, or {what}_steps: null"
                )
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"train.warmup_steps is {self.warmup_steps}; a whole number of steps, or a share of all steps below 1"
            )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("train.early_stopping_threshold needs train.early_stopping_patience")
        for name in self.loggers:
            if self.loggers.count(name) > 1:
                raise ValueError(f"train.loggers names {name} twice")
        if self.init_from_run is not None and not INIT_FROM_RUN.fullmatch(self.init_from_run):
            raise ValueError(
                f"train.init_from_run is {quote(self.init_from_run)}; it should be RUN/step-00000230@1a2b3c4d, as "
                "`python -m stages runs` lists them"
            )
        if self.loss_kwargs and self.loss is None:
            raise ValueError("train.loss_kwargs needs train.loss: name the loss that they are for")
        if self.tf32 and self.precision != "fp32":
            raise ValueError(f"train.tf32 is true, but train.precision is {self.precision}; it speeds up fp32 only")
        return self


class EvaluateParams(Section):
    metrics: Annotated[list[Name], Field(min_length=1)]
    metric_for_best_model: Name
    greater_is_better: bool | None
    eval_batch_size: Rows
    threshold: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateParams:
        for name in self.metrics:
            if self.metrics.count(name) > 1:
                raise ValueError(f"evaluate.metrics names {quote(name)} twice")
        lower = self.metric_for_best_model in LOWER_IS_BETTER
        if self.metric_for_best_model in KNOWN_METRICS and self.greater_is_better is lower:
            raise ValueError(
                f"evaluate.greater_is_better is {str(lower).lower()}, but metric_for_best_model is "
                f"{self.metric_for_best_model}: {'lower' if lower else 'higher'} is better; write null"
            )
        if self.greater_is_better is None and self.metric_for_best_model not in KNOWN_METRICS:
            raise ValueError(
                f"evaluate.greater_is_better is null, but only you know whether more {self.metric_for_best_model} is "
                "better; write true or false"
            )
        return self

    @property
    def higher_wins(self) -> bool:
        """Whether a larger `metric_for_best_model` is better; inferred from its name where not set."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return self.metric_for_best_model not in LOWER_IS_BETTER


class SelectBestParams(Section):
    tie_break: Literal["earliest", "latest"]


class Params(Section):
    data: DataParams
    model: ModelParams
    tokenize: TokenizeParams
    build_loaders: BuildLoadersParams
    train: TrainParams
    evaluate: EvaluateParams
    select_best: SelectBestParams
