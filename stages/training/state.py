"""Everything a run has to remember: the one place that says what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from stages.run.codec import Tree
from stages.training.history import History
from stages.training.optim import Schedule


@dataclass
class EarlyStopping:
    """Counts evaluations without improvement, as HF's EarlyStoppingCallback does.

    `higher_wins`, `patience` and `threshold` come from the parameters; `best`, `bad_evaluations` and `reason` are
    state.
    """

    higher_wins: bool
    patience: int | None
    threshold: float
    best: float | None = None
    bad_evaluations: int = 0
    reason: str | None = None

    def update(self, value: float) -> None:
        """Take in one evaluation's metric; sets `reason` once patience has run out. NaN is never an improvement."""
        if value == value and (
            self.best is None or (value - self.best if self.higher_wins else self.best - value) > self.threshold
        ):
            self.best, self.bad_evaluations = value, 0
            return
        self.bad_evaluations += 1
        if self.patience is not None and self.bad_evaluations >= self.patience:
            self.reason = f"no improvement in {self.bad_evaluations} evaluations"

    def state_dict(self) -> dict[str, Tree]:
        return {"best": self.best, "bad_evaluations": self.bad_evaluations, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        self.best, self.bad_evaluations, self.reason = state["best"], state["bad_evaluations"], state["reason"]


@dataclass
class Progress:
    """Where the run is, in plain numbers. Steps are optimizer steps that are done."""

    step: int = 0
    rows: int = 0
    # An evaluation is due at a step; until it counts, a resumed run does it again.
    evaluated_step: int = 0
    # Sums of step losses: since the last row of plots/train.tsv, and since the start.
    window_loss: float = 0.0
    window_steps: int = 0
    total_loss: float = 0.0
    # Kept models, best first: {"step": int, "scores": {name: value}}.
    candidates: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    environments: int = 1


def _random_state() -> dict[str, Tree]:
    name, keys, *rest = cast("tuple[str, numpy.ndarray, int, int, float]", numpy.random.get_state(legacy=True))
    state: dict[str, Tree] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tree]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class TrainState:
    """The parts of a run that change while it trains."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    stopper: EarlyStopping
    train_history: History
    eval_history: History
    progress: Progress = field(default_factory=Progress)

    def state_dict(self) -> dict[str, Tree]:
        """What a checkpoint holds, one entry a part. Tensors are the live ones: copy before the next step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stopper": self.stopper.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "history": {"train": self.train_history.position(), "eval": self.eval_history.position()},
            "rng": _random_state(),
        }

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        """Go back to where `state` was taken, the history files included."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.stopper.load_state_dict(state["stopper"])
        self.progress = Progress(**state["progress"])
        self.train_history.restore(state["history"]["train"])
        self.eval_history.restore(state["history"]["eval"])
        _restore_random_state(state["rng"])
