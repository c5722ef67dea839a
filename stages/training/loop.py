"""The training loop. Read it top to bottom; everything it calls does one thing."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from stages.batches.randomness import AFTER_BACKWARD
from stages.config.schema import Params
from stages.ground.errors import UserCodeError, UserError, located, say, user_code
from stages.ground.signals import StopRequest
from stages.ground.watchdog import sign_of_life
from stages.keeping.sealed import SaveError
from stages.modeling.buffers import Buffers
from stages.modeling.precision import overflow
from stages.reduction.base import Reduction
from stages.reduction.tree import total
from stages.run.recorder import SilentRecorder
from stages.run.state import TrainState
from stages.scoring.scorer import Predictions, Stopped, shown
from stages.training.callbacks import CallbackList
from stages.training.endings import Ending, Outcome, Unfinished
from stages.training.steps import Gradient, Inputs, Step, load_steps

# fp16 starts at 65536 and halves its scale where a gradient overflows: 30 times down to here. Gradients that still do
# are not too large for the scale, but infinite.
LOWEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Session:
    """A start's training: what it works on (`inputs`, `params`), what changes (`state`), what puts a step together of
    its micro-batches, what writes it down, and who may end it. Several processes run one side by side."""

    params: Params
    inputs: Inputs
    state: TrainState
    reduction: Reduction
    recorder: SilentRecorder
    callbacks: CallbackList
    stop: StopRequest


def train(session: Session) -> Ending:
    """Train until the last step, until a callback ends the run, or a stop request.

    Position is one number, `progress.step`; rows follow from the plan, random numbers from (seed, step, micro-batch).
    `evaluated_step` says whether its evaluation is done. Several processes run this side by side; the main one's
    `recorder` writes.

    Raises:
        SaveError: a checkpoint or candidate could not be written.
    """
    state, reduction, callbacks = session.state, session.reduction, session.callbacks
    steps = load_steps(session.inputs, state.progress, reduction.share, session.params.train.num_workers)
    ending: Ending | None = None
    reduction.start()
    try:
        callbacks.on_train_begin()
        upcoming = next(steps, None)
        while (ending := at_boundary(session)) is None:
            assert upcoming is not None, "the plan ends before the last step"
            step = upcoming
            with untouched_unless_done(step, session) as buffers:
                measured = accumulate(step, buffers, session)
                upcoming = next(steps, None)  # fetched while the device computes
                gradient = Gradient.read(measured)
                require_usable(gradient, step, state)
                reduction.settle(gradient.changed)
            take_step(gradient, step, session)
    except Unfinished as error:
        ending = error.ending
    except UserCodeError:  # of a callback, in the middle of things: the next start tells it of them again
        session.recorder.settle()
        raise
    except RuntimeError as error:
        if session.inputs.compute.world.is_loss(error):
            session.recorder.finish()  # of the processes only one failed, and left this one the state before the step
        raise
    finally:
        reduction.stop()

    callbacks.on_train_end()
    session.recorder.finish()
    return ending


# ---------------------------------------------------------------------------------------------------------------------
# Once in a while: the state is whole here, so this is where it is evaluated, saved and left.


def at_boundary(session: Session) -> Ending | None:
    """Evaluate and save where that is due; how the loop ends, if it ends here."""
    progress, recorder = session.state.progress, session.recorder
    sign_of_life()
    require_progress(session)
    if is_evaluation_due(session):
        evaluate(session)
    stops, saves = agree(session, recorder.is_due())
    if progress.stop_reason is not None and progress.evaluated_step != progress.step:
        evaluate(session)  # where a callback ends the run
    if stops or saves:
        session.state.require_layout()
    if saves:
        recorder.save()
    if progress.is_complete(session.inputs.total_steps):
        return Ending(Outcome.COMPLETE)
    return _stopped(session) if stops else None


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step: the mean over its rows, however it is cut into micro-batches and processes.


def accumulate(step: Step, buffers: Buffers, session: Session) -> Tensor:
    """Forward and backward of this process's micro-batches; the step's gradient is unscaled and clipped then. `buffers`
    are the model's at the step's beginning.

    Returns:
        The numbers of `Gradient`, float32 (3 + buffers,), still on their way on the device.
    """
    state, objective, compute = session.state, session.inputs.objective, session.inputs.compute
    state.model.train()  # a callback may have left it in another mode, of which a resumed run knows nothing
    reduction, device = session.reduction, compute.device
    trained = [p for p in state.model.parameters() if p.requires_grad]
    reduction.begin(step.micro_batches, trained, buffers)
    weights = [objective.weight(batch["labels"]) for micro_batch, batch in step.mine if micro_batch.counted]
    weight = math.fsum(reduction.gather(torch.tensor(weights, dtype=torch.float64)).tolist())
    losses = [torch.zeros(0, device=device)]
    for micro_batch, batch in step.mine:
        compute.seed_at(micro_batch.step, micro_batch.micro_batch)
        batch = compute.put(batch)
        labels = batch.pop("labels")
        with reduction.micro_batch(micro_batch.micro_batch):
            with compute.autocast():
                logits = state.parallel.forward(batch)
            # Rows that are not counted are run because all of DDP's processes take part in a step: they weigh nothing.
            loss = objective.rows(logits, labels).sum() / (weight if micro_batch.counted else math.inf)
            state.scaler.scale(loss).backward()
        if micro_batch.counted:
            losses.append(loss.detach().reshape(1))
    changed = reduction.finish()
    mean_loss = total(reduction.gather(torch.cat(losses)), step.micro_batches, torch.add)
    state.scaler.unscale_(state.optimizer)
    norm = clip_grad_norm_(trained, session.params.train.max_grad_norm or math.inf)
    found = torch.stack([mean_loss, norm.to(device), overflow(state.scaler, state.optimizer, device)])
    return torch.cat([found, changed.to(found)])


def take_step(gradient: Gradient, step: Step, session: Session) -> None:
    """Callbacks, optimizer, schedule, and the row of plots/train.tsv where one is due."""
    state, callbacks = session.state, session.callbacks
    progress = state.progress
    where = f"{step.where}; the last checkpoint counts"
    if not gradient.overflowed:
        session.inputs.compute.seed_at(step.number, AFTER_BACKWARD)
        with located(where, UserCodeError):
            callbacks.on_pre_optimizer_step()
    learning_rate = state.optimizer.param_groups[0]["lr"]
    with (
        located(where, UserCodeError),
        user_code(f"train.optim {session.params.train.optim} fails in step {step.number}"),
    ):
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

    progress.step += 1
    with located(where, UserCodeError), user_code(f"train.lr_scheduler_type fails after step {step.number}"):
        state.schedule.after_step(state.ends_epoch, gradient.overflowed)
    progress.count(gradient.loss, rows=len(step.rows))
    progress.overflows = progress.overflows + 1 if gradient.overflowed else 0
    if progress.overflows == 1 and session.inputs.compute.world.is_main:
        say(f"fp16: the gradient of step {step.number} overflowed, so the step is skipped and the scale halved")
    with located(where, UserCodeError):
        callbacks.on_step_end()
        if progress.step % session.params.train.logging_steps == 0 or progress.step == session.inputs.planned_steps:
            callbacks.on_log(state.close_window(learning_rate, gradient.norm))


def agree(session: Session, due: bool) -> tuple[bool, bool]:
    """Whether to stop, as a signal or a callback of any process asks for it, and whether a save is `due` in the main
    one. The one decision of a turn: what arrives later in a process counts in the next."""
    stop, progress = session.stop, session.state.progress
    number, stopped, saves = session.inputs.compute.world.maximum(
        int(stop.signal or 0), int(progress.stop_reason is not None), int(due)
    )
    if number and stop.signal is None:
        stop.signal = signal.Signals(number)
    if stopped and progress.stop_reason is None:
        progress.stop_reason = "a callback of another process stopped it"
    return bool(number or stopped), bool(saves)


def is_evaluation_due(session: Session) -> bool:
    """Whether this step has an evaluation (`train.eval_strategy`, and the last step) that is not done yet."""
    state, eval_steps = session.state, session.params.train.eval_steps
    step = state.progress.step
    here = state.ends_epoch if eval_steps is None else step % eval_steps == 0
    return (here or step == session.inputs.total_steps) and state.progress.evaluated_step != step


@contextmanager
def untouched_unless_done(step: Step, session: Session) -> Iterator[Buffers]:
    """The way to a step's gradient, which fails as a whole: what the model's own forward changes (running statistics)
    is put back then. Gives what it was. Raises Unfinished, naming what failed and the step's rows."""
    buffers = Buffers(session.state.model)
    try:
        with user_code(f"step {step.number} fails in the model or the loss"):
            yield buffers
    except Unfinished:
        buffers.put_back()
        raise
    except UserError as error:
        buffers.put_back()
        if error.__cause__ is not None and session.inputs.compute.world.is_loss(error.__cause__):
            raise error.__cause__ from None
        line = f"{error}; {step.where}; the state before it is saved"
        raise Unfinished(Ending(Outcome.DIVERGED, line, alone=True)) from error


def require_usable(gradient: Gradient, step: Step, state: TrainState) -> None:
    """Raise Unfinished if a step's loss or gradient is infinite or NaN, and say whose fault that is."""
    if gradient.is_usable:
        return
    line = f"the loss of step {step.number} is {gradient.loss}, its gradient's norm {gradient.norm}; "
    advice = "a lower train.learning_rate, more warmup_steps, max_grad_norm 1.0, or precision fp32"
    broken = _first_broken(state)
    if broken is None:
        line += f"{step.where}; the state before it is saved: look at the rows, or try {advice}"
    else:
        line += (
            f"the state itself holds NaN, infinity or as good as that ({broken}), since step {state.progress.step} at "
            f"the latest, so that no row is to blame and another start does not help: begin anew with {advice}"
        )
    raise Unfinished(Ending(Outcome.DIVERGED, line))


def require_progress(session: Session) -> None:
    """Raise Unfinished where fp16 overflows in step after step, so that nothing is trained."""
    progress, scaler = session.state.progress, session.state.scaler
    if not progress.overflows:
        return
    nothing_at_all = progress.overflows == progress.step == session.inputs.total_steps
    if nothing_at_all or scaler.get_scale() <= LOWEST_SCALE:
        first = progress.step - progress.overflows + 1
        line = (
            f"fp16: the gradient of every step from {first} to {progress.step} overflowed, down to a scale of "
            f"{scaler.get_scale():g}, so nothing was trained in them; the state is saved: write train.precision bf16 "
            "or fp32, or a lower train.learning_rate"
        )
        raise Unfinished(Ending(Outcome.DIVERGED, line))


def evaluate(session: Session) -> None:
    """Score the validation split, write it down, keep the model if it is good, and tell schedule and callbacks. Left
    where it is if asked to stop meanwhile: a resumed run goes on with it. The same in all processes."""
    state, inputs, stop, world = session.state, session.inputs, session.stop, session.inputs.compute.world
    recorder = session.recorder
    state.require_layout()  # it may be saved on the way
    try:
        predictions = inputs.scorer(
            lambda: state.parallel,
            lambda: stop.signal is not None,
            recorder.kept_predictions(),
            recorder.save_if_changed,
        )
        scores = predictions.scores(inputs.task, session.params.evaluate) if world.is_main else None
    except Stopped:
        return
    except SaveError:
        raise
    except UserError as error:
        line = f"{error}; at the evaluation of step {state.progress.step}, whose state is saved"
        raise Unfinished(Ending(Outcome.DIVERGED, line, alone=True)) from error
    scores = world.broadcast_object(scores)
    if world.is_main:
        _doubt_scores(scores, predictions, session)
    state.record("eval", scores)
    state.schedule.after_evaluation(scores)
    state.require_layout()
    if not math.isnan(scores["loss"]):
        recorder.keep_candidate(scores)
    state.progress.evaluated_step = state.progress.step
    session.callbacks.on_evaluate(scores)


def _stopped(session: Session) -> Ending:
    signal_name = session.stop.signal.name if session.stop.signal else "a signal to another process"
    return Ending(
        Outcome.STOPPED,
        f"stopped by {signal_name} after step {session.state.progress.step}, saved; "
        "run the same command again to go on",
    )


def _doubt_scores(scores: dict[str, float], predictions: Predictions, session: Session) -> None:
    """Say what of an evaluation is no number, and what comes of that."""
    step, metric = session.state.progress.step, session.params.evaluate.metric_for_best_model
    if not math.isfinite(scores["loss"]):
        assert predictions.row_losses is not None
        rows = np.flatnonzero(~np.isfinite(predictions.row_losses)).tolist()
        so = ", so it is no candidate" if math.isnan(scores["loss"]) else ""
        say(f"warning: the validation loss of step {step} is {scores['loss']}{so}; it is that of rows {shown(rows)}")
    elif math.isnan(scores[metric]):
        say(f"warning: {metric} of step {step} is nan (evaluate.metric_for_best_model): the validation loss decides")


def _first_broken(state: TrainState) -> str | None:
    """The name of a parameter with NaN, infinity, or a number whose square is infinite, or of a buffer with NaN (some
    are made of infinity)."""
    for name, parameter in state.model.named_parameters():
        if not bool(torch.isfinite(parameter.detach().square()).all()):
            return name
    return next((name for name, buffer in state.model.named_buffers() if bool(torch.isnan(buffer).any())), None)
