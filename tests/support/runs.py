"""A run in small: a state of a few numbers on a store in a temporary folder, without a pipeline around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from stages.config.read import read_yaml
from stages.config.schema import Params
from stages.keeping.folder import RunFolder
from stages.modeling.parallel import Parallel
from stages.run.checkpoint import Checkpoints, Snapshot
from stages.run.history import History
from stages.run.state import Schedule, TrainState
from tests.support.project import ROOT

CPU = torch.device("cpu")
STAGE, IDENTITY = "train", "0123456789ab"


class EveryStep:
    """A learning rate that never changes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    def after_step(self, ends_epoch: bool, skipped: bool) -> None:
        self.scheduler.step()

    def after_evaluation(self, scores: Mapping[str, float]) -> None: ...


def make_params(**train: Any) -> Params:
    """params.yaml as it is in the repository, for a model of one's own."""
    values = read_yaml(ROOT / "params.yaml")
    values["model"] |= {"source": "factory:tests.support.runs:make_model"}
    values["train"] |= train
    return Params.model_validate(values)


def make_model() -> nn.Module:
    return nn.Linear(3, 2)


def make_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    return TrainState(
        parallel=Parallel(model),
        optimizer=optimizer,
        schedule=cast(Schedule, EveryStep(optimizer)),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        callbacks={},
        histories={"train": History(["step", "epoch", "loss", "learning_rate", "grad_norm"]), "eval": History()},
        steps_per_epoch=10,
    )


def take_steps(state: TrainState, count: int) -> None:
    """Train on ones."""
    for _ in range(count):
        loss = state.parallel.forward({"x": torch.ones(4, 3)}).sum()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.progress.step += 1
        state.schedule.after_step(ends_epoch=False, skipped=False)
        state.progress.count(loss.item(), rows=4)
    state.close_window(1e-3, 1.0)


def make_run(folder: Path) -> RunFolder:
    return RunFolder(folder / IDENTITY, STAGE)


def write_checkpoints(run: RunFolder, *steps: int) -> Checkpoints:
    """Small ones, at these steps."""
    checkpoints = Checkpoints(run.checkpoints)
    for step in steps:
        state = {"model": {"w": torch.full((300,), float(step))}, "progress": {"step": step}}
        checkpoints.write(Snapshot.of(step, state))
    return checkpoints
