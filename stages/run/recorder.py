"""What is written while it trains, and when: `train.save_strategy`."""

from __future__ import annotations

from stages.config.schema import TrainParams
from stages.run.candidates import Candidates
from stages.run.checkpoint import CheckpointStore
from stages.run.saver import Saver, TimeSchedule
from stages.run.state import Progress, TrainState


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


class SilentRecorder:
    """Of the processes that write nothing."""

    def keep_candidate(self, scores: dict[str, float]) -> None:
        """See `Recorder`."""

    def save_if_due(self) -> None:
        """See `Recorder`."""


class Recorder(SilentRecorder):
    """Writes candidates and checkpoints of `state` beside the loop.

    `on_disk`: whether there is a checkpoint of `state` as it is, or it is a run's beginning, which needs none.
    """

    def __init__(
        self, state: TrainState, store: CheckpointStore, candidates: Candidates, params: TrainParams, on_disk: bool
    ) -> None:
        self._state = state
        self._candidates = candidates
        self._saver = Saver(store, before_commit=self._sync_histories)
        self._schedule = SaveSchedule(params, self._saver, state.progress if on_disk else None)

    def _sync_histories(self) -> None:
        for history in self._state.histories.values():
            history.sync()

    def keep_candidate(self, scores: dict[str, float]) -> None:
        """Keep the model as it is now if it is among the best."""
        progress = self._state.progress
        progress.candidates = self._candidates.add(progress.candidates, progress.step, scores, self._state.model)
        if not self._saver.busy:
            self._candidates.remove_unused(progress.candidates, self._saver.store)

    def save_if_due(self) -> None:
        """At a step boundary. Raises SaveError if an earlier save failed."""
        self._saver.check()
        if self._schedule.due(self._state.progress, self._state.ends_epoch):
            self._saver.save(self._state.progress.step, self._state.state_dict)

    def finish(self) -> None:
        """Leave the state as it is now on disk, and only what it needs."""
        self._saver.wait()
        if self._schedule.changed(self._state.progress):
            self._saver.save(self._state.progress.step, self._state.state_dict)
            self._saver.wait()
        self._candidates.remove_unused(self._state.progress.candidates, self._saver.store)
