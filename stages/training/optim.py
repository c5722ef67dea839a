"""Optimizers and learning-rate schedulers by name."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from transformers import get_scheduler

from stages.config.imports import import_object
from stages.config.schema import EvaluateParams, TrainParams
from stages.ground.errors import UserError, quote, user_code

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
WITH_WARMUP = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
BY_NAME = {"StepLR": StepLR, "ReduceLROnPlateau": ReduceLROnPlateau}


# Steps of a scheduler that are tried before training: some milliseconds a thousand.
MAX_REHEARSED = 100_000


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training the parameters whose names match a shell-style pattern.

    Raises:
        UserError: a pattern that matches nothing, or nothing left to train.
    """
    for pattern in patterns:
        matched = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise UserError(f"train.freeze: {quote(pattern)} matches no parameter; they are named like {names}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("train.freeze leaves no parameter to train")


def make_optimizer(model: nn.Module, train: TrainParams, device: torch.device) -> Optimizer:
    """The optimizer over what is not frozen; weight decay for matrices only, not for biases and norm weights.

    Raises:
        UserError: an unknown name, a path that cannot be imported, or keywords that it does not take.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kwargs = dict(train.optim_kwargs)
    for key, instead in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if key in kwargs:
            raise UserError(f"train.optim_kwargs: {key} is set elsewhere; write train.{instead}")
    cls: Any = OPTIMIZERS.get(train.optim)
    if cls is None:
        if ":" not in train.optim:
            raise UserError(
                f"train.optim is {quote(train.optim)}; it should be one of {', '.join(OPTIMIZERS)}, or module:Class"
            )
        cls = import_object(train.optim, "train.optim")
    fusible = train.optim in ("adamw_torch", "adam") and device.type in ("cpu", "cuda")
    fusible = fusible and all(p.is_floating_point() for p in trained)  # and not complex
    if fusible and not {"foreach", "differentiable"} & kwargs.keys():
        kwargs.setdefault("fused", True)
    with user_code(f"train.optim_kwargs {quote(train.optim_kwargs)} for {train.optim}"):
        # A step that moves nothing of the model: some keywords are only looked at then.
        rehearsed = nn.Parameter(torch.zeros(2, 2, device=device))
        rehearsed.grad = torch.zeros_like(rehearsed)
        cls([rehearsed], lr=train.learning_rate, **kwargs).step()
        made = cls([group for group in groups if group["params"]], lr=train.learning_rate, **kwargs)
    if not isinstance(made, Optimizer):
        raise UserError(
            f"train.optim {train.optim} gives {type(made).__name__}; it should give a torch.optim.Optimizer"
        )
    return made


class Schedule:
    """A learning-rate scheduler, and when it steps.

    By default once an optimizer step; StepLR once an epoch; ReduceLROnPlateau once an evaluation. As in HF that one is
    given `evaluate.metric_for_best_model`, where the better value of it lies on the side of its `mode`; else, that is
    where it should fall and higher is better, the validation loss.

    Raises:
        UserError: `mode: max` of something of which less is better.
    """

    def __init__(self, scheduler: LRScheduler | ReduceLROnPlateau, evaluate: EvaluateParams) -> None:
        self.scheduler = scheduler
        self._followed = "loss"
        if isinstance(scheduler, ReduceLROnPlateau):
            metric, rises = evaluate.metric_for_best_model, scheduler.mode == "max"
            if rises and not evaluate.higher_wins:
                raise UserError(
                    f"train.lr_scheduler_kwargs: mode is max, but evaluate.metric_for_best_model is {metric}, of which "
                    "less is better, so the rate would fall as the model improves; write mode: min"
                )
            self._followed = metric if rises == evaluate.higher_wins else "loss"

    def after_step(self, ends_epoch: bool, skipped: bool) -> None:
        """`skipped`: the optimizer did not step, so a schedule of its steps does not either."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            return
        if ends_epoch if isinstance(self.scheduler, StepLR) else not skipped:
            self.scheduler.step()

    def after_evaluation(self, scores: Mapping[str, float]) -> None:
        # Nothing is known of a value that is NaN: it is no reason to lower the rate.
        if isinstance(self.scheduler, ReduceLROnPlateau) and not math.isnan(scores[self._followed]):
            self.scheduler.step(scores[self._followed])


def make_schedule(optimizer: Optimizer, train: TrainParams, total_steps: int, evaluate: EvaluateParams) -> Schedule:
    """The scheduler that `train.lr_scheduler_type` names.

    Raises:
        UserError: an unknown name, a path that cannot be imported, keywords it does not take, or warm-up for a
            scheduler that has none.
    """
    name, kwargs = train.lr_scheduler_type, train.lr_scheduler_kwargs
    warmup = round(train.warmup_steps * total_steps) if train.warmup_steps < 1 else int(train.warmup_steps)
    if name not in {**WITH_WARMUP, **BY_NAME} and ":" not in name:
        raise UserError(
            f"train.lr_scheduler_type is {quote(name)}; it should be one of {', '.join([*WITH_WARMUP, *BY_NAME])}, "
            "or module:Class"
        )
    if name not in WITH_WARMUP and train.warmup_steps:
        raise UserError(
            f"train.warmup_steps is {train.warmup_steps}, but {name} has no warm-up; write 0, "
            f"or one of {', '.join(WITH_WARMUP)}"
        )
    cls = None if name in WITH_WARMUP else BY_NAME.get(name) or import_object(name, "train.lr_scheduler_type")

    def build(for_optimizer: Optimizer) -> Any:
        if cls is not None:
            return cls(for_optimizer, **kwargs)
        return get_scheduler(
            WITH_WARMUP[name],
            for_optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=kwargs,
        )

    with user_code(f"train.lr_scheduler_kwargs {quote(kwargs)} for {name}"):
        _rehearse(build, train.learning_rate, min(total_steps, MAX_REHEARSED))
        return Schedule(build(optimizer), evaluate)


def _rehearse(build: Callable[[Optimizer], Any], learning_rate: float, steps: int) -> None:
    """Step a scheduler that moves nothing: a bad keyword shows now, and not at the end of the first epoch or run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=learning_rate)
    scheduler = build(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
