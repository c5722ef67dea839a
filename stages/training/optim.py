"""Optimizers and learning-rate schedulers by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from transformers import get_scheduler

from stages.config.errors import UserError, quote
from stages.config.imports import import_object
from stages.config.params import TrainParams

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
WITH_WARMUP = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
PER_EPOCH = {"StepLR": StepLR}
PER_EVALUATION = {"ReduceLROnPlateau": ReduceLROnPlateau}


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
        UserError: keywords in train.optim_kwargs that it does not take.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kwargs = dict(train.optim_kwargs)
    if train.optim in ("adamw_torch", "adam") and device.type in ("cpu", "cuda"):
        kwargs.setdefault("fused", True)
    try:
        return OPTIMIZERS[train.optim]([g for g in groups if g["params"]], lr=train.learning_rate, **kwargs)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"train.optim_kwargs {quote(train.optim_kwargs)} for {train.optim}: {error}") from None


class Schedule:
    """A learning-rate scheduler, and when it steps.

    By default once an optimizer step; StepLR once an epoch; ReduceLROnPlateau once an evaluation, with the
    validation loss.
    """

    def __init__(self, name: str, scheduler: LRScheduler | ReduceLROnPlateau) -> None:
        self._name = name
        self.scheduler = scheduler

    def after_step(self, ends_epoch: bool) -> None:
        if self._name in PER_EVALUATION or (self._name in PER_EPOCH and not ends_epoch):
            return
        self.scheduler.step()  # type: ignore[call-arg]

    def after_evaluation(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)


def make_schedule(optimizer: Optimizer, train: TrainParams, total_steps: int) -> Schedule:
    """The scheduler that `train.lr_scheduler_type` names.

    Raises:
        UserError: an unknown name, a path that cannot be imported, keywords it does not take, or warm-up for a
            scheduler that has none.
    """
    name, kwargs = train.lr_scheduler_type, train.lr_scheduler_kwargs
    warmup = round(train.warmup_steps * total_steps) if train.warmup_steps < 1 else int(train.warmup_steps)
    known = {**PER_EPOCH, **PER_EVALUATION}
    if name not in {**WITH_WARMUP, **known} and ":" not in name:
        raise UserError(
            f"train.lr_scheduler_type is {quote(name)}; it should be one of {', '.join([*WITH_WARMUP, *known])}, "
            "or module:Class"
        )
    if name not in WITH_WARMUP and train.warmup_steps:
        raise UserError(
            f"train.warmup_steps is {train.warmup_steps}, but {name} has no warm-up; write 0, "
            f"or one of {', '.join(WITH_WARMUP)}"
        )
    cls = None if name in WITH_WARMUP else known.get(name) or import_object(name, "train.lr_scheduler_type")

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

    try:
        _rehearse(build, train.learning_rate, min(total_steps, warmup + 2))
        return Schedule(name, build(optimizer))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"train.lr_scheduler_kwargs {quote(kwargs)} for {name}: {error}") from None


def _rehearse(build: Callable[[Optimizer], Any], learning_rate: float, steps: int) -> None:
    """Step a scheduler that moves nothing: a bad keyword shows now, and not at the end of the first epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=learning_rate)
    scheduler = build(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
