"""Going on: from the run's newest checkpoint that verifies, or from another run, in the environment as it is now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stages.config.errors import UserError
from stages.run import environment
from stages.run.checkpoint import CheckpointStore, step_name
from stages.run.codec import Tree
from stages.run.folder import RunFolder, list_runs, runs_root
from stages.run.identity import Identity
from stages.training.candidates import Candidates
from stages.training.history import History
from stages.training.state import Progress, TrainState

Say = Callable[[str], None]

# What has to be the same for an optimizer's state to mean the same in another run. `data/loaders/` is compared by
# file, so that a run with more epochs goes on from one with fewer.
SAME_PLAN = ("data/tokenized/",)
SAME_OPTIMIZER = (
    "model",
    "stages/custom/",
    "evaluate.",
    "train.loss",
    "train.class_weights",
    "train.label_smoothing",
    "train.optim",
    "train.learning_rate",
    "train.weight_decay",
    "train.lr_scheduler",
    "train.freeze",
    "train.precision",
)


@dataclass(frozen=True)
class Resumer:
    """Brings `state` to where the run was, or to its beginning; `say` is told in a line what is done and why."""

    state: TrainState
    run: RunFolder
    identity: Identity
    store: CheckpointStore
    candidates: Candidates
    total_steps: int
    device: torch.device
    world_size: int
    say: Say

    def resume(self, init_from_run: str | None) -> bool:
        """Load the newest good checkpoint of this run; else start, from run `init_from_run` if that is not None.

        Returns:
            Whether the state is on disk already, or is the beginning, which needs no checkpoint.

        Raises:
            UserError: that run is not there, is being trained, has no good checkpoint, or is of another model.
        """
        state = self.state
        saved = self._newest(self.run, self.store, self.candidates)
        if saved is not None:
            state.load_state_dict(saved)
        else:
            for history in state.histories.values():
                history.restore(None)
            if init_from_run is not None:
                self._start_from(init_from_run)
        progress = state.progress
        if progress.step > self.total_steps:
            raise UserError(
                f"train.init_from_run is {init_from_run}, which is at step {progress.step}, but this run has "
                f"{self.total_steps} steps in all; raise train.num_train_epochs or max_steps"
            )
        complete = progress.is_complete(self.total_steps)
        self._settle_environment(trains=not complete)
        self.run.log("start", step=progress.step, environment=progress.environment)
        if complete:
            self.say(f"run {self.run.id} is complete since step {progress.step}: publishing it, nothing to train")
        elif progress.step:
            self.say(f"run {self.run.id}: going on after step {progress.step} of {self.total_steps}")
        else:
            where = f"{progress.environment['device']}" + (f", {self.world_size} processes" * (self.world_size > 1))
            self.say(f"run {self.run.id}: {self.total_steps} steps on {where}, from the beginning")
        if not complete:
            self.run.unfinish()
        return saved is not None or progress.step == 0

    def _newest(self, run: RunFolder, store: CheckpointStore, candidates: Candidates) -> dict[str, Tree] | None:
        def accept(saved: dict[str, Tree]) -> None:
            Progress(**saved["progress"])
            candidates.check(saved["progress"]["candidates"])
            for name, history in self.state.histories.items():
                History(run.history / history.path.name).check(saved["history"][name])

        def set_aside(step: int, reason: str) -> None:
            self.run.log("damaged checkpoint", run=run.id, step=step, reason=reason)
            self.say(f"checkpoint of step {step} is damaged and was set aside: {reason}")

        return store.newest(accept, set_aside)

    def _start_from(self, run_id: str) -> None:
        other = RunFolder(runs_root() / run_id)
        theirs = other.identity_values()
        if theirs is None:
            known = ", ".join(run.id for run in list_runs() if run.id != self.run.id) or "none"
            raise UserError(f"train.init_from_run is {run_id}, but there is no such run; there are: {known}")
        other.acquire()
        candidates = self.candidates.at(other.candidates)
        try:
            saved = self._newest(other, CheckpointStore(other.checkpoints, other.id), candidates)
        except (KeyError, TypeError):
            raise UserError(f"train.init_from_run is {run_id}, which another version of this code saved") from None
        if saved is None:
            raise UserError(f"train.init_from_run is {run_id}, but that run has no intact checkpoint")
        step = saved["progress"]["step"]
        differences = self._different_state(theirs)
        if differences:
            try:
                self.state.model.load_state_dict(saved["model"])
            except RuntimeError:
                raise UserError(f"train.init_from_run is {run_id}, but its weights fit another model") from None
            self.say(f"starting with the weights of run {run_id} at step {step} only, as {differences[0]}")
        else:
            for candidate in saved["progress"]["candidates"]:
                name = step_name(candidate["step"])
                shutil.copytree(other.candidates / name, self.run.candidates / name, dirs_exist_ok=True)
            for history in self.state.histories.values():
                shutil.copyfile(other.history / history.path.name, history.path)
            try:
                self.state.load_state_dict(saved)
            except (RuntimeError, ValueError, KeyError):
                raise UserError(f"train.init_from_run is {run_id}, but its state fits other code than this") from None
            self.state.progress.stop_reason = None  # what stopped that run may be what was changed
            self.say(f"continuing run {run_id} after step {step}: same optimizer and plan, everything goes on")
        self.run.log("init from run", run=run_id, step=step, weights_only=bool(differences))
        other.release()

    def _different_state(self, theirs: dict[str, Any]) -> list[str]:
        """Why the other run's optimizer and position mean nothing here; empty if they do."""
        differences = []
        for key in sorted(self.identity.values.keys() | theirs.keys()):
            same = self.identity.values.get(key) == theirs.get(key)
            if not same and (
                key.startswith(SAME_PLAN + SAME_OPTIMIZER) or (key.startswith("data/loaders/epoch") and key in theirs)
            ):
                differences.append(f"{key} differs")
        return differences

    def _settle_environment(self, trains: bool) -> None:
        """Restore the thread count, which changes bits; count and name any other change, if there is a step left."""
        progress = self.state.progress
        before = progress.environment
        threads = before.get("threads", torch.get_num_threads())
        if threads != torch.get_num_threads():
            self.say(f"intra-op threads set from {torch.get_num_threads()} to {threads}, as the run began with")
            torch.set_num_threads(threads)
        now = environment.current(self.device, self.world_size)
        if not trains:
            return
        if before and before != now:
            progress.environments += 1
            changes = ", ".join(environment.difference(before, now))
            self.say(f"warning: the environment changed ({changes}); the result may differ in its last bits")
        progress.environment = now
