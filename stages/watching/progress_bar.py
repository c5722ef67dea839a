"""Progress for people: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from stages.training.callbacks import Callback

if TYPE_CHECKING:
    from stages.run.state import TrainState


class ProgressBar(Callback):
    """The training loop's progress: running loss, learning rate, samples/s and time left."""

    LINE_SECONDS = 10.0

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def on_train_begin(self, state: TrainState) -> None:
        self._bar = tqdm(
            initial=state.progress.step,
            total=self._total,
            unit="step",
            dynamic_ncols=True,
            desc="training",
            disable=not sys.stderr.isatty(),
        )
        self._begin = self._said = time.monotonic()
        self._first_step, self._first_row = state.progress.step, state.progress.rows

    def on_step_end(self, state: TrainState) -> None:
        progress, now = state.progress, time.monotonic()
        speed = (progress.rows - self._first_row) / max(now - self._begin, 1e-9)
        learning_rate = state.optimizer.param_groups[0]["lr"]
        figures = {"loss": f"{progress.mean_loss:.4f}", "lr": f"{learning_rate:.2e}", "samples/s": f"{speed:.1f}"}
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(1)
        step, total = progress.step, self._total
        if self._bar.disable and (now - self._said >= self.LINE_SECONDS or step == total):
            left = (now - self._begin) / (step - self._first_step) * (total - step)
            values = " ".join(f"{key} {value}" for key, value in figures.items())
            print(f"step {step}/{total} {values} ETA {left:.0f} s", file=sys.stderr, flush=True)
            self._said = now

    def on_train_end(self, state: TrainState) -> None:
        self._bar.close()
