"""Going on: from the newest checkpoint that verifies, in the environment as it is now."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stages.run import environment
from stages.run.checkpoint import CheckpointStore
from stages.run.codec import Tree
from stages.run.folder import RunFolder
from stages.training.candidates import Candidates
from stages.training.loop import Inputs
from stages.training.state import TrainState


def resume(
    state: TrainState,
    store: CheckpointStore,
    candidates: Candidates,
    run: RunFolder,
    inputs: Inputs,
    say: Callable[[str], None],
) -> None:
    """Bring `state` to where the run was, or to its beginning; `say` is told in a line what is done and why."""

    def accept(saved: dict[str, Tree]) -> None:
        candidates.check(saved["progress"]["candidates"])
        state.train_history.check(saved["history"]["train"])
        state.eval_history.check(saved["history"]["eval"])

    def set_aside(step: int, reason: str) -> None:
        run.log("damaged checkpoint", step=step, reason=reason)
        say(f"checkpoint of step {step} is damaged and was set aside: {reason}")

    saved = store.newest(accept, set_aside)
    if saved is None:
        state.train_history.restore(None)
        state.eval_history.restore(None)
    else:
        state.load_state_dict(saved)
    settle_environment(state, inputs.device, say)
    progress = state.progress
    run.log("start", step=progress.step, environment=progress.environment)
    if state.stopper.reason or progress.evaluated_step == inputs.total_steps:
        say(f"run {run.id} is complete since step {progress.step}: publishing it, nothing to train")
    elif saved is not None:
        say(f"run {run.id}: going on after step {progress.step} of {inputs.total_steps}")
    else:
        say(f"run {run.id}: {inputs.total_steps} steps on {inputs.device}, from the beginning")


def settle_environment(state: TrainState, device: torch.device, say: Callable[[str], None]) -> None:
    """Restore the thread count, which changes bits; count and name any other difference to the environment before."""
    progress = state.progress
    before = progress.environment
    threads = before.get("threads", torch.get_num_threads())
    if threads != torch.get_num_threads():
        say(f"intra-op threads set from {torch.get_num_threads()} to {threads}, as the run began with")
        torch.set_num_threads(threads)
    now = environment.current(device, world_size=1)
    if before and before != now:
        progress.environments += 1
        changes = ", ".join(environment.difference(before, now))
        say(f"warning: the environment changed ({changes}); the result may differ in its last bits")
    progress.environment = now
