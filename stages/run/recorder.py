"""What is written while it trains, and when: `train.save_strategy`."""

from __future__ import annotations

import contextlib

from stages.config.schema import TrainParams
from stages.keeping.folder import RunFolder
from stages.keeping.sealed import DamagedError
from stages.run.candidates import Candidates
from stages.run.checkpoint import Checkpoints
from stages.run.saver import Saver, TimeSchedule
from stages.run.state import TrainState, parse_progress
from stages.scoring.kept import Kept, validation_of


class SilentRecorder:
    """Of the processes that write nothing; they take part in making a state whole, which may be spread over all.

    `is_saved`: whether there is a checkpoint of `state` as it is, or it is a run's beginning, which needs none.
    """

    def __init__(self, state: TrainState, is_saved: bool) -> None:
        self._state = state
        self._saved = self._mark() if is_saved else None

    def is_due(self) -> bool:
        """Whether to save at this step boundary. Raises SaveError if an earlier save failed."""
        return False

    def keep_candidate(self, scores: dict[str, float]) -> None:
        """Keep the model as it is now if it is among the best."""

    def save(self) -> None:
        """Copy the state as it is now; writing it goes on beside the loop. Raises SaveError, also of an earlier save,
        and UserCodeError."""
        self._state.state_dict()
        self._saved = self._mark()

    def save_if_changed(self) -> None:
        """Save, unless this state was saved already. Raises what `save` does."""
        if self._is_changed():
            self.save()

    def kept_predictions(self) -> Kept | None:
        """What is done of the evaluation of this step, and where more of it is kept; None in a process that writes
        nothing."""
        return None

    def settle(self) -> None:
        """Return when what was saved is on disk. Raises SaveError if it cannot be."""

    def finish(self) -> None:
        """Leave the state as it is now on disk, and only what it needs. Raises what `save` does."""
        self.save_if_changed()

    def _mark(self) -> tuple[int, int]:
        return self._state.progress.step, self._state.progress.evaluated_step

    def _is_changed(self) -> bool:
        """Whether the state is another than the one saved last (or loaded)."""
        return self._mark() != self._saved


class Recorder(SilentRecorder):
    """Of the main process: writes candidates and checkpoints of `state`. By time, every `save_steps` steps, or every
    epoch; never twice for the same state."""

    def __init__(
        self, state: TrainState, is_saved: bool, run: RunFolder, candidates: Candidates, params: TrainParams
    ) -> None:
        super().__init__(state, is_saved)
        self._params, self._run = params, run
        self._checkpoints, self._candidates = Checkpoints(run.checkpoints), candidates
        self._saver = Saver(self._checkpoints)
        self._time = TimeSchedule(params.save_seconds)

    def is_due(self) -> bool:
        self._saver.check()
        if not self._is_changed():
            return False
        match self._params.save_strategy:
            case "time":  # a save still in flight would make the loop wait for the disk
                return not self._saver.busy and self._time.is_due(self._saver.last_cost)
            case "steps":
                assert self._params.save_steps is not None
                return self._state.progress.step % self._params.save_steps == 0
            case _:
                return self._state.ends_epoch

    def keep_candidate(self, scores: dict[str, float]) -> None:
        progress = self._state.progress
        progress.candidates = self._candidates.add(progress.candidates, progress.step, scores, self._state.model)
        if not self._saver.busy:
            self._remove_unused()

    def kept_predictions(self) -> Kept | None:
        # Without deterministic algorithms a step that is trained again may leave another model.
        return Kept(self._run.atoms(validation_of(self._state.progress.step))) if self._params.deterministic else None

    def save(self) -> None:
        self._time.begun()
        self._saver.save(self._state.progress.step, self._state.state_dict)
        self._saved = self._mark()

    def settle(self) -> None:
        self._saver.wait()

    def finish(self) -> None:
        self.settle()
        super().finish()
        self.settle()
        self._remove_unused()

    def _remove_unused(self) -> None:
        """Remove models that nothing refers to, and the predictions of steps whose evaluation is on disk, but those of
        candidates, which evaluate can use."""
        self._candidates.remove_unused(self._state.progress.candidates, self._checkpoints)
        evaluated, of_models = 0, set(self._candidates.shelf.steps())
        for saved in self._checkpoints.peek("progress"):
            with contextlib.suppress(DamagedError):
                evaluated = max(evaluated, parse_progress(saved).evaluated_step)
        for step in self._run.steps_in_atoms():
            if step <= evaluated and step not in of_models:
                self._run.atoms(validation_of(step)).remove()
