"""The training loop. Read it top to bottom; everything it calls does one thing."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import datasets
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from stages.batches.collate import Batch, make_loader
from stages.batches.plan import BatchPlan, MicroBatch, share
from stages.batches.randomness import AFTER_BACKWARD
from stages.batches.tokenized import Task
from stages.config.schema import Params
from stages.ground.signals import StopRequest, ignore_stop_signals
from stages.modeling.buffers import remember_buffers
from stages.modeling.compute import Compute
from stages.modeling.losses import Objective
from stages.modeling.precision import overflow
from stages.run.recorder import SilentRecorder
from stages.run.state import TrainState
from stages.scoring.scorer import Scorer, Stopped
from stages.training.callbacks import CallbackList

SHOWN_ROWS = 64


@dataclass(frozen=True)
class Inputs:
    """What the loop works on and does not change. `tokenizer` is None where the inputs are features."""

    task: Task
    train_split: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase | None
    plan: BatchPlan
    total_steps: int
    objective: Objective
    scorer: Scorer
    compute: Compute


@dataclass(frozen=True)
class Session:
    """A start's training: what it works on (`inputs`, `params`), what changes (`state`), what writes it down, and
    who may end it. Several processes run one side by side."""

    params: Params
    inputs: Inputs
    state: TrainState
    recorder: SilentRecorder
    callbacks: CallbackList
    stop: StopRequest


class Outcome(IntEnum):
    """How a start of train can end; the number is its exit code."""

    COMPLETE = 0
    STOPPED = 1
    DIVERGED = 2


@dataclass(frozen=True)
class Ending:
    """How training ended: `line` says it to people where the run is not complete."""

    outcome: Outcome
    line: str = ""


@dataclass(frozen=True)
class Step:
    """One optimizer step: its `number`, from 1; `rows`, the positions in train of all its rows; and this process's
    micro-batches with their batches, on the CPU."""

    number: int
    rows: list[int]
    mine: list[tuple[MicroBatch, Batch]]


@dataclass(frozen=True)
class Gradient:
    """What a step's backward passes left: `loss`, the mean over its rows, the gradient's `norm` before clipping, and
    whether it `overflowed` in fp16, whose scaler then skips the step and lowers its scale."""

    loss: float
    norm: float
    overflowed: bool

    @classmethod
    def read(cls, measured: Tensor) -> Gradient:
        """Wait for what `accumulate` returned: the one wait for the device in a step."""
        loss, norm, overflowed = measured.tolist()
        return cls(loss, norm, bool(overflowed))

    @property
    def is_usable(self) -> bool:
        return math.isfinite(self.loss) and (math.isfinite(self.norm) or self.overflowed)


def train(session: Session) -> Ending:
    """Train until the last step, until a callback ends the run, or a stop request.

    Position is one number, `progress.step`; rows follow from the plan, random numbers from (seed, step, micro-batch).
    `evaluated_step` says whether its evaluation is done. Several processes run this side by side; the main one's
    `recorder` writes.

    Raises:
        SaveError: a checkpoint or candidate could not be written.
    """
    state, callbacks = session.state, session.callbacks
    steps = load_steps(session.inputs, state.progress.step + 1, session.params.train.num_workers)
    state.parallel.start()
    callbacks.on_train_begin()
    state.model.train()

    ending: Ending | None = None
    upcoming = next(steps, None)
    while (ending := at_boundary(session)) is None:
        assert upcoming is not None, "the plan ends before the last step"
        step, put_buffers_back = upcoming, remember_buffers(state.model)
        measured = accumulate(step, session)
        upcoming = next(steps, None)  # fetched while the device computes
        gradient = Gradient.read(measured)
        if not gradient.is_usable:
            put_buffers_back()
            ending = _diverged(gradient, step)
            break
        take_step(gradient, step, session)

    callbacks.on_train_end()
    session.recorder.finish()
    return ending


# ---------------------------------------------------------------------------------------------------------------------
# Once in a while: the state is whole here, so this is where it is evaluated, saved and left.


def at_boundary(session: Session) -> Ending | None:
    """Evaluate and save where that is due; how the loop ends, if it ends here."""
    progress, recorder = session.state.progress, session.recorder
    if is_evaluation_due(session):
        evaluate(session)
    stops, saves = agree(session, recorder.is_due())
    if progress.stop_reason is not None and progress.evaluated_step != progress.step:
        evaluate(session)  # where a callback ends the run
    if saves:
        recorder.save()
    if progress.is_complete(session.inputs.total_steps):
        return Ending(Outcome.COMPLETE)
    return _stopped(session) if stops else None


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step: the mean over its rows, however it is cut into micro-batches and processes.


def accumulate(step: Step, session: Session) -> Tensor:
    """Forward and backward of the step's micro-batches; the gradient is unscaled and clipped then.

    Returns:
        The numbers of `Gradient`, float32 (3,), still on their way on the device.
    """
    state, objective, compute = session.state, session.inputs.objective, session.inputs.compute
    parallel, device = state.parallel, compute.device
    weights = [objective.weight(batch["labels"]) for micro_batch, batch in step.mine if micro_batch.counted]
    weight = parallel.sum(torch.tensor(sum(weights), dtype=torch.float64)).item()  # on the CPU
    loss = torch.zeros((), device=device)
    for micro_batch, batch in step.mine:
        compute.seed_at(micro_batch.step, micro_batch.micro_batch)
        batch = compute.put(batch)
        labels = batch.pop("labels")
        with parallel.sync(last=micro_batch is step.mine[-1][0]):
            with compute.autocast():
                logits = parallel.forward(batch)
            # Rows that are not counted are run because all processes take part in a gradient: they weigh nothing.
            micro_loss = objective.rows(logits, labels).sum() / (weight if micro_batch.counted else math.inf)
            state.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    state.scaler.unscale_(state.optimizer)
    trained = [p for p in state.model.parameters() if p.requires_grad]
    norm = clip_grad_norm_(trained, session.params.train.max_grad_norm or math.inf)
    return torch.stack([parallel.sum(loss), norm.to(device), overflow(state.scaler, state.optimizer, device)])


def take_step(gradient: Gradient, step: Step, session: Session) -> None:
    """Callbacks, optimizer, schedule, and the row of plots/train.tsv where one is due."""
    state, callbacks = session.state, session.callbacks
    progress = state.progress
    if not gradient.overflowed:
        session.inputs.compute.seed_at(step.number, AFTER_BACKWARD)
        callbacks.on_pre_optimizer_step()
    learning_rate = state.optimizer.param_groups[0]["lr"]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()

    progress.step += 1
    state.schedule.after_step(state.ends_epoch, gradient.overflowed)
    progress.count(gradient.loss, rows=len(step.rows))
    callbacks.on_step_end()
    if progress.step % session.params.train.logging_steps == 0 or progress.step == session.inputs.total_steps:
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


def evaluate(session: Session) -> None:
    """Score the validation split, write it down, keep the model if it is good, and tell schedule and callbacks. Left
    undone if asked to stop meanwhile: a resumed run does it again. The same in all processes."""
    state, inputs, stop, world = session.state, session.inputs, session.stop, session.inputs.compute.world
    try:
        predictions = inputs.scorer(state.parallel, lambda: stop.signal is not None)
    except Stopped:
        return
    scores = predictions.scores(inputs.task, session.params.evaluate) if world.is_main else None
    scores = world.broadcast_object(scores)
    if world.is_main and not math.isfinite(scores["loss"]):
        print(f"warning: the validation loss of step {state.progress.step} is {scores['loss']}", file=sys.stderr)
    state.record("eval", scores)
    state.schedule.after_evaluation(scores["loss"])
    session.recorder.keep_candidate(scores)
    state.progress.evaluated_step = state.progress.step
    session.callbacks.on_evaluate(scores)


def load_steps(inputs: Inputs, first: int, num_workers: int) -> Iterator[Step]:
    """The steps from number `first` to the last, with this process's share of their batches."""
    device, rank, size = inputs.compute.device, inputs.compute.world.rank, inputs.compute.world.size
    plan = [inputs.plan.steps(first, inputs.total_steps) for _ in range(2)]
    rows = (micro_batch.rows for step in plan[0] for micro_batch in share(step, rank, size))
    batches = iter(make_loader(inputs.train_split, rows, inputs.tokenizer, device, num_workers, ignore_stop_signals))
    for step in plan[1]:
        mine = [(micro_batch, next(batches)) for micro_batch in share(step, rank, size)]
        yield Step(step[0].step, [row for micro_batch in step for row in micro_batch.rows], mine)


def _stopped(session: Session) -> Ending:
    signal_name = session.stop.signal.name if session.stop.signal else "a signal to another process"
    return Ending(
        Outcome.STOPPED,
        f"stopped by {signal_name} after step {session.state.progress.step}, saved; "
        "run the same command again to go on",
    )


def _diverged(gradient: Gradient, step: Step) -> Ending:
    shown = ", ".join(map(str, step.rows[:SHOWN_ROWS])) + (", ..." if len(step.rows) > SHOWN_ROWS else "")
    return Ending(
        Outcome.DIVERGED,
        f"the loss of step {step.number} is {gradient.loss}, its gradient's norm {gradient.norm}; its rows of train "
        f"are {shown}; the state before it is saved: look at the rows, or try a lower train.learning_rate, more "
        "warmup_steps, max_grad_norm 1.0, or precision fp32",
    )
