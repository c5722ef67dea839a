"""Loggers: the rows of plots/ where people watch them: TensorBoard, Weights & Biases or DVCLive (`train.loggers`).

The histories are the truth: when a run goes on, they are cut back to its checkpoint. So every start clears what a
logger wrote below the run's folder and writes it again from them. That needs no record of its own of what was
handed over, and whatever a kill leaves, in the middle of this too, the next start clears: every row once, none lost.

The names are those of Hugging Face's trainer: train/loss, eval/accuracy and so on, by optimizer step.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.ground.disk import dumps
from stages.ground.errors import UserError, reason, say
from stages.training.callbacks import Callback

if TYPE_CHECKING:
    from stages.run.state import TrainState

# W&B waits this long for its server, at a start and at an end, before it gives up.
WANDB_SECONDS = 30


class Logger(Callback, ABC):
    """Base of all loggers: what one has to do, and when."""

    name: ClassVar[str]
    """In params.yaml, of its folder below the run's, and for pip."""
    module: ClassVar[str]
    """A submodule: a folder of the package's name beside the code would pass for the package."""

    def __init__(self, folder: Path, run_id: str, params: dict[str, Any]) -> None:
        self.folder, self.run_id, self.params = folder / self.name, run_id, params
        self._works = True
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise UserError(f"train.loggers: {self.name} cannot be used ({error}); pip install {self.name}") from None

    @abstractmethod
    def open(self) -> None:
        """Begin anew; the folder is there and empty."""

    @abstractmethod
    def write(self, step: int, values: dict[str, float]) -> None:
        """Show `values` at an optimizer step."""

    @abstractmethod
    def close(self) -> None:
        """Hand over what is not yet."""

    def on_train_begin(self, state: TrainState) -> None:
        self._try(self._refill, state)

    def on_log(self, state: TrainState, row: dict[str, float]) -> None:
        self._try(self._write_row, state.progress.step, "train", {"epoch": state.epoch, **row})

    def on_evaluate(self, state: TrainState, scores: dict[str, float]) -> None:
        self._try(self._write_row, state.progress.step, "eval", scores)

    def on_train_end(self, state: TrainState) -> None:
        self._try(self.close)

    def _refill(self, state: TrainState) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self.open()
        rows = [(int(row["step"]), kind, row) for kind in ("train", "eval") for row in state.histories[kind].rows()]
        # The order in which the loop comes to them: a step is logged before it is evaluated.
        for step, kind, row in sorted(rows, key=lambda item: item[0]):
            self._write_row(step, kind, row)

    def _write_row(self, step: int, kind: str, row: dict[str, float]) -> None:
        left_out = {"step"} if kind == "train" else {"step", "epoch"}
        self.write(step, {f"{kind}/{name}": value for name, value in row.items() if name not in left_out})

    def _try(self, action: Callable[..., None], *values: Any) -> None:
        """A backend that fails is left alone until the next start, which shows it everything again."""
        if not self._works:
            return
        try:
            action(*values)
        except Exception as error:
            self._works = False
            why = reason(error) or type(error).__name__
            say(f"warning: {self.name} fails, training goes on without it: {why}")


class TensorBoard(Logger):
    """One event file. Its records are written here and not through torch's SummaryWriter, whose thread holds them
    back for minutes and prints a traceback where the disk is full."""

    name = "tensorboard"
    module = "tensorboard.summary.writer.record_writer"

    def open(self) -> None:
        from tensorboard.plugins.text.summary import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        # A new name each time: an open TensorBoard does not look twice at one.
        path = self.folder / f"events.out.tfevents.{time.time_ns()}"
        self._records = RecordWriter(path.open("wb"))
        self._add(file_version="brain.Event:2")
        self._add(summary=text_pb("params", f"```\n{dumps(self.params)}```"))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=found))

    def close(self) -> None:
        self._records.close()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


class WeightsAndBiases(Logger):
    """One W&B run, by the run's id. W&B's own step counts rows, so that a step's evaluation, which may come a start
    later than its loss, is a row of its own. A server keeps the rows that it was given, and says how many."""

    name = "wandb"
    module = "wandb.sdk"

    def open(self) -> None:
        import wandb

        os.environ.setdefault("WANDB_CACHE_DIR", str(self.folder / "cache"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        settings = wandb.Settings(
            silent=True,
            console="off",
            # It would run git in the repository.
            disable_git=True,
            disable_code=True,
            init_timeout=WANDB_SECONDS,
            finish_timeout=WANDB_SECONDS,
        )
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is known: `wandb login` stores one, WANDB_MODE=offline needs none")
        project = os.environ.get("WANDB_PROJECT", "holdfast")
        where = self.folder.parent
        self._run = wandb.init(id=self.run_id, resume="allow", project=project, dir=where, config=self.params)
        self._run.define_metric("*", step_metric="train/global_step")
        self._rows = 0

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._rows >= self._run.starting_step:
            self._run.log({"train/global_step": step, **values}, step=self._rows, commit=True)
        self._rows += 1

    def close(self) -> None:
        self._run.finish()


class DVCLive(Logger):
    """A folder of tables, and metrics.json."""

    name = "dvclive"
    module = "dvclive.live"

    def open(self) -> None:
        from dvclive import Live

        class Folder(Live):
            """Live that only writes its folder. As it comes it opens the repository, where it names an experiment
            after DVC_* variables and adds files to git, and posts to DVC Studio, twice what is written twice."""

            def _init_dvc(self) -> None: ...

            def _init_studio(self) -> None: ...

        self._live = Folder(str(self.folder), save_dvc_exp=False, dvcyaml=None)
        self._live.log_params(self.params)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._live.step = step
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.make_summary()

    def close(self) -> None:
        """Live.end() would go to the repository; all is written."""


LOGGERS: dict[str, type[Logger]] = {logger.name: logger for logger in (TensorBoard, WeightsAndBiases, DVCLive)}


def make_loggers(names: Sequence[str], folder: Path, run_id: str, params: dict[str, Any]) -> list[Callback]:
    """The loggers of `train.loggers`, which write below the run's `folder`; for the main process alone.

    Raises:
        UserError: a package is not there.
    """
    return [LOGGERS[name](folder, run_id, params) for name in names]
