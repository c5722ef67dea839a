"""Going on: from the run's newest checkpoint that verifies, or from another run, in the environment as it is now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stages.ground.errors import UserError
from stages.ground.places import step_name
from stages.keeping import environment
from stages.keeping.folder import RunFolder, find_source
from stages.keeping.identity import Identity
from stages.keeping.sealed import DamagedError
from stages.modeling.device import set_threads
from stages.run.candidates import Candidates
from stages.run.checkpoint import CheckpointStore
from stages.run.codec import Tree
from stages.run.history import History
from stages.run.state import Progress, TrainState

Say = Callable[[str], None]


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
    threads: int | None
    say: Say

    def resume(self, init_from_run: str | None) -> bool:
        """Load the newest good checkpoint of this run; else start, from `init_from_run` if that is not None: it is
        needed only until this run has saved a checkpoint of its own.

        Returns:
            Whether the state is on disk already, or is the beginning, which needs no checkpoint.

        Raises:
            UserError: that run or checkpoint is not there, is being trained, is damaged, or of another model.
        """
        state = self.state
        saved = self._newest()
        if saved is not None:
            state.load_state_dict(saved)
        else:
            for history in state.histories.values():
                history.begin()
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
            self.run.withdraw_finished()
        return saved is not None or progress.step == 0

    def _newest(self) -> dict[str, Tree] | None:
        def set_aside(step: int, reason: str) -> None:
            self.run.log("damaged checkpoint", step=step, reason=reason)
            self.say(f"checkpoint of step {step} is damaged and was set aside: {reason}")

        return self.store.newest(lambda saved: self._accept(self.run, self.candidates, saved), set_aside)

    def _accept(self, run: RunFolder, candidates: Candidates, saved: dict[str, Tree]) -> None:
        """Raise DamagedError if what the state refers to in the folder of `run` is not intact."""
        Progress(**saved["progress"])
        candidates.check(saved["progress"]["candidates"])
        for name, history in self.state.histories.items():
            History(run.history / history.path.name).check(saved["history"][name])

    def _start_from(self, reference: str) -> None:
        other, step = find_source(reference)
        named = f"train.init_from_run is {reference}"
        other.lock.acquire()
        try:
            saved = CheckpointStore(other.checkpoints, other.id).read(step)
            differences = self.identity.differences_that_reset_the_optimizer(other.identity_values() or {})
            if not differences:
                self._accept(other, self.candidates.at(other.candidates), saved)
        except DamagedError as error:
            raise UserError(f"{named}, but that checkpoint is damaged: {error}") from None
        if differences:
            try:
                self.state.model.load_state_dict(saved["model"])
            except RuntimeError:
                raise UserError(f"{named}, but its weights fit another model") from None
            self.say(f"starting with the weights of {reference} only, as {differences[0]} differs")
        else:
            for candidate in saved["progress"]["candidates"]:
                name = step_name(candidate["step"])
                shutil.copytree(other.candidates / name, self.run.candidates / name, dirs_exist_ok=True)
            for history in self.state.histories.values():
                shutil.copyfile(other.history / history.path.name, history.path)
            try:
                self.state.load_state_dict(saved)
            except (RuntimeError, ValueError, KeyError):
                raise UserError(f"{named}, but its state fits other code than this") from None
            self.state.progress.stop_reason = None  # what stopped that run may be what was changed
            self.say(f"continuing {reference}: same optimizer and plan, everything goes on")
        self.run.log("init from run", source=reference, weights_only=bool(differences))
        other.lock.release()

    def _settle_environment(self, trains: bool) -> None:
        """Restore the thread count, or take `train.threads`, as it changes bits; count and name any other change, if
        there is a step left."""
        progress = self.state.progress
        before = progress.environment
        set_threads(self.threads or before.get("threads"))
        now = environment.current(self.device, self.world_size)
        if not trains:
            return  # the outs are those of the environment before
        if before and before != now:
            progress.environments += 1
            changes = ", ".join(environment.difference(before, now))
            self.say(f"warning: the environment changed ({changes}); the result may differ in its last bits")
        progress.environment = now
        self.run.keep_environment(now)
