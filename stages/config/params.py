"""params.yaml, validated as a whole: the one place that says which parameters exist and what they may be.

Names are those of Hugging Face `TrainingArguments` where one exists. Nothing heavy is imported here, so a
typo is reported before torch is loaded.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stages.config.errors import UserError, quote

PARAMS_FILE = "params.yaml"

# Metrics that have a module in stages/metrics, per task; `loss` is always available as metric_for_best_model.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "precision", "recall", "matthews_correlation"),
}
LOWER_IS_BETTER = ("loss",)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]


class DataParams(Section):
    path: Name
    dataset: Name | None
    config: Name | None
    revision: Name | None
    text_columns: Annotated[list[Name], Field(min_length=1, max_length=2)]
    label_column: Name
    label_names: Annotated[list[Name], Field(min_length=2)] | None
    task: Literal["classification"]
    validation_size: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed

    @model_validator(mode="after")
    def _consistent(self) -> DataParams:
        if self.dataset is None and (self.config or self.revision):
            key = "config" if self.config else "revision"
            raise ValueError(f"data.{key} needs data.dataset (a Hub id); it says nothing about data.path")
        columns = [*self.text_columns, self.label_column]
        for column in columns:
            if columns.count(column) > 1:
                raise ValueError(f"column {quote(column)} is named twice in text_columns and label_column")
        if self.label_names and len(set(self.label_names)) != len(self.label_names):
            raise ValueError("data.label_names has a name twice; every class needs its own")
        return self


class ModelParams(Section):
    source: Name
    revision: Name | None
    kwargs: dict[str, Any]


class TokenizeParams(Section):
    max_length: Annotated[int, Field(ge=4)]


class BuildLoadersParams(Section):
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
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


class TrainParams(Section):
    num_train_epochs: PositiveInt
    max_steps: PositiveInt | None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: NonNegativeFloat
    optim: Literal["adamw_torch", "adam", "sgd", "adafactor"]
    optim_kwargs: dict[str, Any]
    lr_scheduler_type: Name
    lr_scheduler_kwargs: dict[str, Any]
    warmup_steps: NonNegativeFloat
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    freeze: list[Name]
    precision: Literal["fp32", "bf16", "fp16"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    class_weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | Literal["balanced"] | None
    eval_strategy: Literal["epoch", "steps"]
    eval_steps: PositiveInt | None
    early_stopping_patience: PositiveInt | None
    early_stopping_threshold: NonNegativeFloat
    keep_candidates: PositiveInt
    save_strategy: Literal["time", "steps", "epoch"]
    save_steps: PositiveInt | None
    save_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    logging_steps: PositiveInt
    num_workers: Annotated[int, Field(ge=0)]
    seed: Seed
    deterministic: bool
    device: Name
    launcher: Name
    init_from_run: Annotated[str, Field(pattern="^[0-9a-f]{12}$")] | None

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
        return self


class EvaluateParams(Section):
    metrics: Annotated[list[Name], Field(min_length=1)]
    metric_for_best_model: Name
    greater_is_better: bool | None
    eval_batch_size: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateParams:
        for name in self.metrics:
            if self.metrics.count(name) > 1:
                raise ValueError(f"evaluate.metrics names {quote(name)} twice")
        if self.metric_for_best_model not in (*self.metrics, "loss"):
            raise ValueError(
                f"evaluate.metric_for_best_model is {quote(self.metric_for_best_model)}, which is neither loss "
                f"nor one of evaluate.metrics ({', '.join(self.metrics)})"
            )
        if self.greater_is_better and self.metric_for_best_model == "loss":
            raise ValueError("evaluate.greater_is_better is true, but metric_for_best_model is loss: lower is better")
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

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        known = METRICS[self.data.task]
        for name in self.evaluate.metrics:
            if name not in known:
                raise ValueError(
                    f"evaluate.metrics names {quote(name)}, which nobody knows for {self.data.task}; "
                    f"known are {', '.join(known)}"
                )
        weights, names = self.train.class_weights, self.data.label_names
        if isinstance(weights, list) and names and len(weights) != len(names):
            raise ValueError(
                f"train.class_weights has {len(weights)} numbers for the {len(names)} classes in data.label_names"
            )
        return self


# HF names that work differently here: what to write instead.
INSTEAD = {
    "per_device_train_batch_size": "build_loaders.batch_size (rows per optimizer step over all processes) "
    "and build_loaders.micro_batch_size (rows per forward pass)",
    "per_device_eval_batch_size": "evaluate.eval_batch_size",
    "gradient_accumulation_steps": "build_loaders.batch_size and build_loaders.micro_batch_size; "
    "accumulation is their quotient",
    "warmup_ratio": "train.warmup_steps with a share below 1",
    "fp16": "train.precision: fp16",
    "bf16": "train.precision: bf16",
    "evaluation_strategy": "train.eval_strategy",
    "group_by_length": "build_loaders.bucketing: length",
    "dataloader_num_workers": "train.num_workers",
    "dataloader_drop_last": "build_loaders.drop_last",
    "label_smoothing_factor": "train.label_smoothing",
    "full_determinism": "train.deterministic",
    "save_total_limit": "train.keep_candidates (models); two checkpoints are always kept",
    "load_best_model_at_end": "nothing: select_best always picks by evaluate.metric_for_best_model",
    "resume_from_checkpoint": "nothing: a killed run continues by itself; train.init_from_run starts from another",
    "data_seed": "build_loaders.seed",
    "max_seq_length": "tokenize.max_length",
    "lr": "train.learning_rate",
    "output_dir": "nothing: models are in models/, run state in runs/",
}


def _unknown_key(section: str, key: str) -> str:
    sections = {name: field.annotation for name, field in Params.model_fields.items()}
    if not section:
        return f"unknown section {quote(key)}; the sections are {', '.join(sections)}"
    if key in INSTEAD:
        return f"{section}.{key} is not a key here; write {INSTEAD[key]}"
    for other, model in sections.items():
        if other != section and key in model.model_fields:  # type: ignore[union-attr]
            return f"{section}.{key} is in the wrong section; write {other}.{key}"
    allowed = list(sections[section].model_fields)  # type: ignore[union-attr]
    close = difflib.get_close_matches(key, allowed, 1)
    hint = f"did you mean {close[0]}?" if close else f"the keys of {section} are {', '.join(allowed)}"
    return f"unknown key {section}.{key}; {hint}"


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    # Unions put the name of the branch that was tried into the location; the key alone is what the user typed.
    key = ".".join(where[:2])
    if first["type"] == "extra_forbidden":
        line = _unknown_key(".".join(where[:-1]), where[-1])
    elif first["type"] == "missing":
        line = f"{key} is missing; every key must be there (null where it allows it)"
    elif first["type"] == "value_error":
        line = str(first["ctx"]["error"])
    else:
        allowed = {
            e["msg"].removeprefix("Input should be ") for e in error.errors() if e["loc"][:2] == first["loc"][:2]
        }
        line = f"{key} is {quote(first['input'])}; it should be {' or '.join(sorted(allowed))}"
    others = {e["loc"][:2] for e in error.errors()} - {first["loc"][:2]}
    return line + (f" (and {len(others)} more)" if others else "")


def parse_params(values: object) -> Params:
    """Validate the mapping read from params.yaml.

    Raises:
        UserError: with the key, its value and what is allowed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{PARAMS_FILE}: expected a mapping of sections, found {quote(values)}")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{PARAMS_FILE}: {_one_line(error)}") from None


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as DVC does (YAML 1.2: `2e-5` is a number).

    Raises:
        UserError: if it is missing, not UTF-8, or no YAML, with the line.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the folder that holds it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml. Raises `UserError` with one line naming the key."""
    return parse_params(read_yaml(path))
