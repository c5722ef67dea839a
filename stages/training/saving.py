"""When a checkpoint is due: `train.save_strategy`."""

from __future__ import annotations

from stages.config.params import TrainParams
from stages.run.saver import Saver, TimeSchedule
from stages.training.state import Progress


class SaveSchedule:
    """By time, every `save_steps` steps, or every epoch; never twice for the same state.

    `on_disk`: the progress that the newest checkpoint has already, or None if there is no checkpoint.
    """

    def __init__(self, params: TrainParams, saver: Saver, on_disk: Progress | None) -> None:
        self._params = params
        self._saver = saver
        self._time = TimeSchedule(params.save_seconds)
        self._on_disk = None if on_disk is None else self._mark(on_disk)

    @staticmethod
    def _mark(progress: Progress) -> tuple[int, int]:
        return progress.step, progress.evaluated_step

    def changed(self, progress: Progress) -> bool:
        """Whether the state is another than the one saved last (or loaded)."""
        return self._mark(progress) != self._on_disk

    def due(self, progress: Progress, ends_epoch: bool) -> bool:
        """Whether to save now; the caller then does."""
        if not self.changed(progress):
            return False
        strategy = self._params.save_strategy
        if strategy == "time":
            # A save still in flight would make the loop wait for the disk.
            due = self._time.due() and not self._saver.busy
        elif strategy == "steps":
            assert self._params.save_steps is not None
            due = progress.step % self._params.save_steps == 0
        else:
            due = ends_epoch
        if due:
            self._time.saved(self._saver.last_cost)
            self._on_disk = self._mark(progress)
        return due
