"""Callbacks: code that looks into the loop, stops it, or changes its gradients. All of the events, in order:

    on_train_begin                    once a start, after a checkpoint was loaded
    at every step boundary:
      on_evaluate(scores)             where an evaluation is due, once it is complete
      ...                             a checkpoint where one is due; the end, if a callback or a signal asked for it
      ...                             forward and backward of the step's micro-batches; gradients unscaled and clipped
      on_pre_optimizer_step           gradients may be changed here
      ...                             optimizer, learning-rate scheduler
      on_step_end                     `state.progress.step` counts this step now
      on_log(row)                     every `train.logging_steps`: a row of plots/train.tsv
    on_train_end                      also when the run was stopped

`train.callbacks` in params.yaml lists your own:

    callbacks:
      - class: stages.custom.noise:GradientNoise
        kwargs: {std: 0.01}

What a callback must not forget when it is killed belongs into its `state_dict`: numbers, text, None, tensors, and
lists, tuples and dicts of them. It is part of every checkpoint. torch, NumPy and Python random numbers are seeded
before `on_pre_optimizer_step`, by (seed, step), so drawing them there is repeatable. With several processes every one
of them runs the callbacks: what they do to gradients has to be the same on all, and the state that is saved is that of
the main one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from stages.config.imports import import_object
from stages.config.schema import CallbackParams, Params
from stages.ground.errors import UserCodeError, UserError, quote, user_code

if TYPE_CHECKING:
    from stages.modeling.codec import Tree
    from stages.run.state import TrainState


class Callback:
    """Base of all callbacks; override what you need. `state` is the live one: `state.model`, `.optimizer`,
    `.progress`; `state.stop(reason)` ends the run at the next step boundary, as complete."""

    def on_train_begin(self, state: TrainState) -> None:
        """Training begins or goes on, at `state.progress.step`."""

    def on_evaluate(self, state: TrainState, scores: dict[str, float]) -> None:
        """The validation split was scored: `loss` and the metrics of `evaluate.metrics`."""

    def on_pre_optimizer_step(self, state: TrainState) -> None:
        """The gradients of the step are complete, unscaled and clipped; they may be changed in place, and have to
        stay finite. Left out where fp16 overflowed and the step is skipped."""

    def on_step_end(self, state: TrainState) -> None:
        """An optimizer step is done."""

    def on_log(self, state: TrainState, row: dict[str, float]) -> None:
        """A row of plots/train.tsv, at `state.progress.step`: loss (mean since the last row), learning_rate,
        grad_norm."""

    def on_train_end(self, state: TrainState) -> None:
        """Training ends here, or was stopped and goes on with the next start."""

    def state_dict(self) -> dict[str, Tree]:
        """What a checkpoint has to hold of this callback."""
        return {}

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        """Go back to where `state_dict` was called."""


class CallbackList:
    """Passes each event on to every callback: those of `state`, and `watchers`, which only show something."""

    def __init__(self, state: TrainState, watchers: Sequence[Callback] = ()) -> None:
        self._callbacks = [*cast("Mapping[str, Callback]", state.callbacks).values(), *watchers]
        self._state = state

    def on_train_begin(self) -> None:
        self._each("on_train_begin")

    def on_evaluate(self, scores: dict[str, float]) -> None:
        self._each("on_evaluate", scores)

    def on_pre_optimizer_step(self) -> None:
        changing = [c for c in self._callbacks if type(c).on_pre_optimizer_step is not Callback.on_pre_optimizer_step]
        self._each("on_pre_optimizer_step")
        gradients = [p.grad for p in self._state.model.parameters() if p.grad is not None]
        if changing and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            # Before it is in the weights, and from there in every checkpoint.
            names = " or ".join(type(callback).__name__ for callback in changing)
            raise UserCodeError(
                f"train.callbacks: {names} made a gradient of step {self._state.progress.step + 1} infinite or NaN"
            )

    def on_step_end(self) -> None:
        self._each("on_step_end")

    def on_log(self, row: dict[str, float]) -> None:
        self._each("on_log", row)

    def on_train_end(self) -> None:
        self._each("on_train_end")

    def _each(self, event: str, *values: Any) -> None:
        for callback in self._callbacks:
            with user_code(f"{type(callback).__name__}.{event} at step {self._state.progress.step}"):
                getattr(callback, event)(self._state, *values)


class EarlyStopping(Callback):
    """Stops after `patience` evaluations without an improvement of `metric` by more than `threshold`, as HF's
    EarlyStoppingCallback does. Where that is NaN, the validation loss is looked at instead."""

    def __init__(self, metric: str, higher_wins: bool, patience: int, threshold: float) -> None:
        self._metric, self._higher_wins, self._patience, self._threshold = metric, higher_wins, patience, threshold
        self.best: float | None = None
        self.lowest_loss: float | None = None
        self.bad_evaluations = 0

    def on_evaluate(self, state: TrainState, scores: dict[str, float]) -> None:
        value, loss = scores[self._metric], scores["loss"]
        if math.isnan(value):
            improves = self._gain(self.lowest_loss, loss, higher_wins=False) > self._threshold
        else:
            improves = self._gain(self.best, value, self._higher_wins) > self._threshold
        if improves and not math.isnan(value):
            self.best = value
        if self._gain(self.lowest_loss, loss, higher_wins=False) > 0:
            self.lowest_loss = loss
        if improves:
            self.bad_evaluations = 0
            return
        self.bad_evaluations += 1
        if self.bad_evaluations >= self._patience:
            state.stop(f"no improvement in {self.bad_evaluations} evaluations")

    @staticmethod
    def _gain(best: float | None, value: float, higher_wins: bool) -> float:
        """By how much `value` is better than the best before; NaN is not."""
        if best is None:
            return -math.inf if math.isnan(value) else math.inf
        return (value - best) * (1 if higher_wins else -1)

    def state_dict(self) -> dict[str, Tree]:
        return {"best": self.best, "lowest_loss": self.lowest_loss, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        self.best, self.bad_evaluations = state["best"], state["bad_evaluations"]
        self.lowest_loss = state["lowest_loss"]


def make_callbacks(params: Params) -> dict[str, Callback]:
    """What runs in every process and is part of the state, by name: early stopping, and those of `train.callbacks`.

    Raises:
        UserError: one cannot be imported, is no Callback, or does not take its keywords.
    """
    train, evaluate = params.train, params.evaluate
    callbacks: dict[str, Callback] = {}
    if train.early_stopping_patience is not None:
        callbacks["early stopping"] = EarlyStopping(
            evaluate.metric_for_best_model,
            evaluate.higher_wins,
            train.early_stopping_patience,
            train.early_stopping_threshold,
        )
    for number, entry in enumerate(train.callbacks):
        callbacks[f"{number} {entry.class_}"] = _load(entry)
    return callbacks


def _load(entry: CallbackParams) -> Callback:
    cls: Any = import_object(entry.class_, "train.callbacks")
    with user_code(f"train.callbacks: {entry.class_} with {quote(entry.kwargs)}"):
        made = cls(**entry.kwargs)
    if not isinstance(made, Callback):
        raise UserError(f"train.callbacks: {entry.class_} is not derived from stages.training.callbacks.Callback")
    return made
