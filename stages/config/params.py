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
    "classification": (
        "accuracy", "f1", "f1_micro", "f1_macro", "precision", "recall", "matthews_correlation", "roc_auc",
    ),
    "multi_label": ("accuracy", "f1_micro", "f1_macro", "precision", "recall", "roc_auc"),
    "regression": ("mse", "mae", "r_squared", "pearsonr", "spearmanr"),
}  # fmt: skip
LOWER_IS_BETTER = ("loss", "mse", "mae")
# Losses by name, per task; the first is what `loss: null` stands for.
LOSSES: dict[str, tuple[str, ...]] = {
    "classification": ("cross_entropy", "bce_with_logits"),
    "multi_label": ("bce_with_logits",),
    "regression": ("mse", "l1", "huber"),
}
FACTORY = "factory:"


def is_custom(name: str) -> bool:
    """Whether a loss or metric is the user's own: `module:callable`, or the folder of an `evaluate` module."""
    return ":" in name or "/" in name


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
    text_columns: Annotated[list[Name], Field(max_length=2)]
    feature_columns: list[Name]
    label_column: Name
    label_separator: Name
    label_names: Annotated[list[Name], Field(min_length=1)] | None
    task: Literal["classification", "multi_label", "regression"]
    validation_size: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed

    @model_validator(mode="after")
    def _consistent(self) -> DataParams:
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
        if self.label_names and self.task == "regression":
            raise ValueError("data.label_names is set, but data.task regression has no classes; write null")
        if self.label_names and self.task == "classification" and len(self.label_names) < 2:
            raise ValueError("data.label_names has one name; classification needs two or more")
        if self.label_names and len(set(self.label_names)) != len(self.label_names):
            raise ValueError("data.label_names has a name twice; every class needs its own")
        return self


class ModelParams(Section):
    source: Name
    revision: Name | None
    kwargs: dict[str, Any]


class TokenizeParams(Section):
    tokenizer: Name | None
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

    @property
    def micro_batches_per_step(self) -> int:
        """Of a whole step; an epoch's last may have fewer."""
        return self.batch_size // self.micro_batch_size


class CallbackParams(Section):
    class_: Annotated[str, Field(alias="class", pattern=r"^[\w.]+:\w+$")]
    kwargs: dict[str, Any] = {}


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
    tf32: bool
    compile: bool
    loss: Name | None
    loss_kwargs: dict[str, Any]
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
    logging_steps: PositiveInt
    callbacks: list[CallbackParams]
    loggers: list[Literal["tensorboard", "wandb", "dvclive"]]
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
        for name in self.loggers:
            if self.loggers.count(name) > 1:
                raise ValueError(f"train.loggers names {name} twice")
        if self.loss_kwargs and self.loss is None:
            raise ValueError("train.loss_kwargs needs train.loss: name the loss that they are for")
        if self.tf32 and self.precision != "fp32":
            raise ValueError(f"train.tf32 is true, but train.precision is {self.precision}; it speeds up fp32 only")
        return self


class EvaluateParams(Section):
    metrics: Annotated[list[Name], Field(min_length=1)]
    metric_for_best_model: Name
    greater_is_better: bool | None
    eval_batch_size: PositiveInt
    threshold: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateParams:
        for name in self.metrics:
            if self.metrics.count(name) > 1:
                raise ValueError(f"evaluate.metrics names {quote(name)} twice")
        if self.greater_is_better and self.metric_for_best_model == "loss":
            raise ValueError("evaluate.greater_is_better is true, but metric_for_best_model is loss: lower is better")
        known = {"loss", *(name for names in METRICS.values() for name in names)}
        if self.greater_is_better is None and self.metric_for_best_model not in known:
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

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for check in (self._check_inputs, self._check_loss, self._check_metrics):
            check()
        return self

    def _check_inputs(self) -> None:
        source, features = self.model.source, self.data.feature_columns
        factory = source.startswith(FACTORY)
        if features and not factory:
            raise ValueError(
                f"data.feature_columns needs a model of your own, but model.source is {quote(source)}; "
                "write factory:module:callable, or name data.text_columns"
            )
        if features and self.tokenize.tokenizer:
            raise ValueError("tokenize.tokenizer is set, but data.feature_columns are numbers; write null")
        if features and self.build_loaders.bucketing == "length":
            raise ValueError("build_loaders.bucketing is length, but rows of feature_columns have none; write none")
        if factory and not features and not self.tokenize.tokenizer:
            raise ValueError(
                "tokenize.tokenizer is null, but a factory model brings no tokenizer; "
                "write a Hub id, a folder, or package:NAME/PATH that has one"
            )

    def _check_loss(self) -> None:
        task, train = self.data.task, self.train
        allowed = LOSSES[task]
        loss = train.loss or allowed[0]
        if loss not in allowed and not is_custom(loss):
            raise ValueError(
                f"train.loss is {quote(loss)}; for {task} it should be {', '.join(allowed)}, or module:callable"
            )
        if loss == "bce_with_logits" and task == "classification" and len(self.data.label_names or "ab") > 2:
            raise ValueError(
                "train.loss is bce_with_logits, but data.label_names has more than two classes; "
                "write cross_entropy, or data.task: multi_label if a row can have several"
            )
        for key in ("class_weights", "label_smoothing"):
            if getattr(train, key) and (task == "regression" or is_custom(loss)):
                off = "null" if key == "class_weights" else "0.0"
                raise ValueError(f"train.{key} is set, but the loss {quote(loss)} has none; write {off}")
        weights, names = train.class_weights, self.data.label_names
        if isinstance(weights, list) and names and len(weights) != len(names):
            raise ValueError(
                f"train.class_weights has {len(weights)} numbers for the {len(names)} classes in data.label_names"
            )

    def _check_metrics(self) -> None:
        known = METRICS[self.data.task]
        for name in self.evaluate.metrics:
            if name not in known and not is_custom(name):
                raise ValueError(
                    f"evaluate.metrics names {quote(name)}, which nobody knows for {self.data.task}; "
                    f"known are {', '.join(known)}, module:callable, and the folder of an evaluate module"
                )
        best = self.evaluate.metric_for_best_model
        if best not in (*self.evaluate.metrics, "loss") and not any(map(is_custom, self.evaluate.metrics)):
            raise ValueError(
                f"evaluate.metric_for_best_model is {quote(best)}, which is neither loss nor one of evaluate.metrics "
                f"({', '.join(self.evaluate.metrics)})"
            )
        if self.data.task == "regression" and self.evaluate.threshold != 0.5:
            raise ValueError("evaluate.threshold is set, but data.task regression decides nothing; write 0.5")


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
    "torch_compile": "train.compile",
    "report_to": "train.loggers",
    "metric": "evaluate.metrics",
    "max_seq_length": "tokenize.max_length",
    "lr": "train.learning_rate",
    "output_dir": "nothing: models are in models/, run state in runs/",
}


def _unknown_key(section: str, key: str) -> str:
    sections = {name: field.annotation for name, field in Params.model_fields.items()}
    if not section:
        return f"unknown section {quote(key)}; the sections are {', '.join(sections)}"
    if section not in sections:  # an entry of a list, such as train.callbacks.0
        return f"unknown key {section}.{key}; its keys are class and kwargs"
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
        line = f"{'.'.join(where)} is missing; every key must be there (null where it allows it)"
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
