"""Going on: from the run's newest checkpoint that verifies, or from another run, in the environment as it is now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from stages.config.schema import Params
from stages.ground.errors import UserError, reason
from stages.keeping import environment
from stages.keeping.folder import RunFolder, find_source
from stages.keeping.identity import Identity
from stages.keeping.sealed import DamagedError
from stages.modeling.codec import Tree
from stages.modeling.compute import Compute
from stages.modeling.device import set_threads
from stages.run.candidates import Candidates
from stages.run.checkpoint import Checkpoints
from stages.run.state import Candidate, TrainState, saved_progress

Say = Callable[[str], None]
# What loading a state raises that was saved by other code, or that somebody made up.
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Resumer:
    """Brings a state to where the run was, or to its beginning; `say` is told in a line what is done and why."""

    run: RunFolder
    identity: Identity
    candidates: Candidates
    params: Params
    compute: Compute
    say: Say

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run.checkpoints)

    def resume(self, build: Callable[[], TrainState], total_steps: int) -> tuple[TrainState, bool]:
        """Load the newest good checkpoint of this run; else start, from `train.init_from_run` if that is not null: it
        is needed only until this run has saved a checkpoint of its own.

        Args:
            build: makes the state of a run's beginning.

        Returns:
            The state, and whether it is on disk already, or is the beginning, which needs no checkpoint.

        Raises:
            UserError: that run or checkpoint is not there, is being trained, is damaged, or of another model.
        """
        state, source = self._newest(build), self.params.train.init_from_run
        is_saved = state is not None
        if state is None:
            state = self._without_stop(build, total_steps)
        if state is None:
            state = build()
            if source is not None:
                self._start_from(source, state, total_steps)
        complete = state.progress.is_complete(total_steps)
        self._settle_environment(state, trains=not complete)
        size = self.compute.world.size
        self.run.log("start", step=state.progress.step, environment=state.progress.environment, processes=size)
        if complete:
            self.say(f"run {self.run.id} is complete since step {state.progress.step}: publishing it, nothing to train")
        elif state.progress.step:
            self.say(f"run {self.run.id}: going on after step {state.progress.step} of {total_steps}")
        else:
            where = f"{state.progress.environment['device']}" + (f", {size} processes" * (size > 1))
            self.say(f"run {self.run.id}: {total_steps} steps on {where}, from the beginning")
        return state, is_saved or state.progress.step == 0

    def _newest(self, build: Callable[[], TrainState]) -> TrainState | None:
        """The state of the newest checkpoint that is whole, with all the models that it names. What is passed over is
        set aside, so that it is neither used nor lost."""
        lost: dict[int, str] = {}
        steps = self.run.checkpoints.steps()
        for step in steps:
            try:
                saved = self.checkpoints.read(step)
                damaged = self._damaged(saved_progress(saved).candidates)
            except DamagedError as error:
                self._set_aside_checkpoint(step, str(error))
                continue
            if damaged:
                # It is whole, but leads to a result without the model that it names.
                lost |= damaged
                self.run.checkpoints.invalidate(step)
                continue
            state = build()
            try:
                state.load_state_dict(saved)
            except torch.OutOfMemoryError:
                raise  # no fault of what is loaded
            except MISFITS as error:
                self._set_aside_checkpoint(step, f"it cannot be loaded, {type(error).__name__}: {error}")
                continue
            self._set_aside_candidates(lost, steps[0], step)
            return state
        self._set_aside_candidates(lost, max(steps, default=0), 0)
        return None

    def _without_stop(self, build: Callable[[], TrainState], total_steps: int) -> TrainState | None:
        """The newest state up to `train.stop_step` of the run that is the same without it: up to there they are one."""
        if self.params.train.stop_step is None:
            return None
        other = RunFolder.of(replace(self.identity, values=self.identity.values | {"train.stop_step": None}))
        steps = [step for step in other.checkpoints.steps() if step <= total_steps]
        if not steps:
            return None
        other.lock.acquire()
        try:
            for step in steps:
                try:
                    saved = Checkpoints(other.checkpoints).read(step)
                    for candidate in saved_progress(saved).candidates:
                        self.candidates.take_over(candidate, Candidates(other.candidates, self.params))
                    state = build()
                    state.load_state_dict(saved)
                except torch.OutOfMemoryError:
                    raise  # no fault of what is loaded
                except (DamagedError, *MISFITS) as error:
                    self.say(f"checkpoint of step {step} of run {other.id} is of no use: {reason(error)}")
                    continue
                self.say(f"run {self.run.id}: taken over from run {other.id}, which has no train.stop_step")
                self.run.log("taken over", source=other.reference(step))
                return state
        finally:
            other.lock.release()
        return None

    def _set_aside_checkpoint(self, step: int, reason: str) -> None:
        reason = " ".join(reason.split())[:500]
        self.run.checkpoints.invalidate(step)
        self.run.log("damaged checkpoint", step=step, reason=reason)
        self.say(f"checkpoint of step {step} is damaged and was set aside: {reason}")

    def _set_aside_candidates(self, lost: dict[int, str], newest: int, step: int) -> None:
        for damaged, why in lost.items():
            self.run.candidates.invalidate(damaged)
            self.run.log("damaged candidate", step=damaged, reason=why)
            self.say(
                f"the candidate of step {damaged} is damaged and was set aside, and DVC's cache does not have it: "
                f"training again from step {step} of the {newest} that were done ({why})"
            )

    def _damaged(self, kept: list[Candidate]) -> dict[int, str]:
        """The candidates that are damaged, and not to be had from DVC's cache, with what is wrong."""
        damaged = {}
        for candidate in kept:
            try:
                self.candidates.ensure(candidate, self.say)
            except DamagedError as error:
                damaged[candidate.step] = str(error)
        return damaged

    def _start_from(self, reference: str, state: TrainState, total_steps: int) -> None:
        other, step = find_source(reference)
        named = f"train.init_from_run is {reference}"
        other.lock.acquire()
        try:
            saved = Checkpoints(other.checkpoints).read(step)
            progress = saved_progress(saved)
            differences = self.identity.differences_that_reset_the_optimizer(other.identity_values() or {})
            if differences:
                self._load_weights(state, saved, named)
                self.say(f"starting with the weights of {reference} only, as {differences[0]} differs")
            else:
                if progress.step > total_steps:
                    raise UserError(
                        f"{named}, which is at step {progress.step}, but this run has {total_steps} steps in all; "
                        "raise train.num_train_epochs or max_steps"
                    )
                for candidate in progress.candidates:
                    self.candidates.take_over(candidate, Candidates(other.candidates, self.params))
                self._load(state, saved, named)
                state.progress.stop_reason = None  # what stopped that run may be what was changed
                self.say(f"continuing {reference}: same optimizer and plan, everything goes on")
        except DamagedError as error:
            raise UserError(f"{named}, but that checkpoint is damaged: {error}") from None
        self.run.log("init from run", source=reference, weights_only=bool(differences))
        other.lock.release()

    def _load_weights(self, state: TrainState, saved: dict[str, Tree], named: str) -> None:
        try:
            state.parallel.load_state_dict(saved["model"])
        except MISFITS:
            raise UserError(f"{named}, but its weights fit another model") from None

    def _load(self, state: TrainState, saved: dict[str, Tree], named: str) -> None:
        try:
            state.load_state_dict(saved)
        except MISFITS:
            raise UserError(f"{named}, but its state fits other code than this") from None

    def _settle_environment(self, state: TrainState, trains: bool) -> None:
        """Restore the thread count, or take `train.threads`, as it changes bits; count and name any other change, if
        there is a step left."""
        progress = state.progress
        before = progress.environment
        set_threads(self.params.train.threads or before.get("threads"))
        now = environment.current(self.compute.device)
        if self.params.train.reduction == "fast":
            now["world_size"] = self.compute.world.size
        if not trains:
            return  # the outs are those of the environment before
        if before and before != now:
            progress.environments += 1
            changes = ", ".join(environment.difference(before, now))
            self.say(f"warning: the environment changed ({changes}); the result may differ in its last bits")
        progress.environment = now
        self.run.keep_environment({**now, "environments": progress.environments})
