"""`python -m stages finish`: end the run that params.yaml describes at its next evaluation, with the best so far."""

from __future__ import annotations

from stages.batches.plan import BatchPlan
from stages.config.pipeline import load_stage
from stages.config.read import PARAMS_FILE, change_param
from stages.ground.errors import UserError, say
from stages.keeping.folder import RunFolder
from stages.keeping.identity import identify


def finish() -> None:
    """Write `train.stop_step`, the step of the next evaluation, into params.yaml: what stops a run decides its result.

    Raises:
        UserError: there is no such run, it is finished or being trained, or nothing is left to cut off.
    """
    stage = load_stage("train")
    train = stage.params.train
    if train.stop_step is not None:
        raise UserError(f"train.stop_step is {train.stop_step} already; run: python -m stages repro")
    run = RunFolder.of(identify(stage))
    holder, steps = run.lock.holder(), run.checkpoints.steps()
    if holder is not None:
        raise UserError(f"run {run.id} is being trained by process {holder}; stop it first (it saves), and try again")
    if run.finished:
        raise UserError(f"run {run.id} is finished; run: python -m stages repro")
    if not steps:
        raise UserError(
            f"no run of {PARAMS_FILE} and the files as they are now has a checkpoint, so none can be finished"
        )
    plan = BatchPlan()
    every = train.eval_steps or plan.steps_per_epoch
    step = -(-steps[0] // every) * every
    last = plan.planned_steps(train.num_train_epochs, train.max_steps)
    if step >= last:
        raise UserError(f"the next evaluation of run {run.id} is its last, at step {last}; run: python -m stages repro")
    change_param("train", "stop_step", step)
    say(
        f"train.stop_step: {step} is written into {PARAMS_FILE}; run {run.id} is at step {steps[0]}. "
        "`python -m stages repro` goes on from there and ends at that evaluation; with null it trains to the end"
    )
