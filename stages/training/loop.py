"""The training loop. Read it top to bottom; everything it calls does one thing."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import datasets
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from stages.batches.collate import Batch, make_loader, to_device
from stages.batches.plan import BatchPlan, MicroBatch, share
from stages.batches.randomness import AFTER_BACKWARD, seed_all
from stages.batches.tokenized import Task
from stages.config.schema import Params, TrainParams
from stages.ground.errors import UserError
from stages.ground.signals import StopRequest, ignore_stop_signals
from stages.modeling.buffers import remember_buffers
from stages.modeling.forward import Forward, compiled
from stages.modeling.losses import Objective
from stages.modeling.precision import autocast, overflow
from stages.modeling.world import Parallel, World
from stages.run.recorder import SilentRecorder
from stages.run.state import Progress, TrainState
from stages.scoring.predict import Stopped, predict
from stages.training.callbacks import Callback, CallbackList

SHOWN_ROWS = 64


@dataclass(frozen=True)
class Inputs:
    """What the loop works on and does not change."""

    task: Task
    train_split: datasets.Dataset
    validation_split: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase | None
    plan: BatchPlan
    total_steps: int
    objective: Objective
    device: torch.device
    world: World


class NonFiniteLoss(UserError):
    """The loss or its gradient became NaN or infinite; the state before that step is intact."""


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


def train(
    state: TrainState,
    inputs: Inputs,
    params: Params,
    recorder: SilentRecorder,
    watchers: Sequence[Callback],
    stop: StopRequest,
) -> None:
    """Train until the last step, until a callback ends the run, or a stop request; `state` says which.

    Position is one number, `progress.step`; rows follow from the plan, random numbers from (seed, step, micro-batch).
    `evaluated_step` says whether its evaluation is done. Several processes run this side by side; the main one's
    `recorder` writes, and it alone has `watchers`, callbacks that only show something.

    Raises:
        NonFiniteLoss: with the step, its rows and what to try.
        SaveError: a checkpoint or candidate could not be written.
    """
    callbacks = CallbackList([*cast("Mapping[str, Callback]", state.callbacks).values(), *watchers], state)
    parallel = Parallel(Forward(state.model), inputs.world, inputs.device)
    forward = compiled(parallel.module) if params.train.compile else parallel.module
    steps = load_steps(inputs, state.progress.step + 1, params.train.num_workers)
    callbacks.on_train_begin()
    state.model.train()

    upcoming = next(steps, None)
    while not at_boundary(state, inputs, params, recorder, callbacks, stop):
        assert upcoming is not None, "the plan ends before the last step"
        step, put_buffers_back = upcoming, remember_buffers(state.model)
        measured = accumulate(step, state, inputs, params.train, parallel, forward)
        upcoming = next(steps, None)  # fetched while the device computes
        gradient = Gradient.read(measured)
        if not gradient.is_usable:
            put_buffers_back()
            callbacks.on_train_end()
            raise _non_finite(gradient, step)
        take_step(gradient, step, state, inputs, params.train, callbacks)

    callbacks.on_train_end()


# ---------------------------------------------------------------------------------------------------------------------
# Once in a while: the state is whole here, so this is where it is evaluated, saved and left.


def at_boundary(
    state: TrainState,
    inputs: Inputs,
    params: Params,
    recorder: SilentRecorder,
    callbacks: CallbackList,
    stop: StopRequest,
) -> bool:
    """Evaluate and save where that is due; whether the loop ends here, which all processes decide together, once."""
    if is_evaluation_due(params.train, state, inputs.total_steps):
        evaluate(state, inputs, params, recorder, callbacks, stop)
    stops = agree_to_stop(inputs.world, stop, state.progress)
    if state.progress.stop_reason is not None and state.progress.evaluated_step != state.progress.step:
        evaluate(state, inputs, params, recorder, callbacks, stop)  # where a callback ends the run
    recorder.save_if_due()
    return stops or state.progress.step == inputs.total_steps


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step: the mean over its rows, however it is cut into micro-batches and processes.


def accumulate(
    step: Step, state: TrainState, inputs: Inputs, options: TrainParams, parallel: Parallel, forward: nn.Module
) -> Tensor:
    """Forward and backward of the step's micro-batches; the gradient is unscaled and clipped then.

    Returns:
        The numbers of `Gradient`, float32 (3,), still on their way on the device.
    """
    device, objective, world = inputs.device, inputs.objective, inputs.world
    weights = [objective.weight(batch["labels"]) for micro_batch, batch in step.mine if micro_batch.counted]
    weight = world.sum(torch.tensor(sum(weights), dtype=torch.float64)).item()  # on the CPU
    loss = torch.zeros((), device=device)
    for micro_batch, batch in step.mine:
        seed_all(options.seed, micro_batch.step, micro_batch.micro_batch)
        batch = to_device(batch, device)
        labels = batch.pop("labels")
        with parallel.sync(last=micro_batch is step.mine[-1][0]):
            with autocast(device, options.precision):
                logits = forward(batch)
            # Rows that are not counted are run because all processes take part in a gradient: they weigh nothing.
            micro_loss = objective.rows(logits, labels).sum() / (weight if micro_batch.counted else math.inf)
            state.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    state.scaler.unscale_(state.optimizer)
    trained = [p for p in state.model.parameters() if p.requires_grad]
    norm = clip_grad_norm_(trained, options.max_grad_norm or math.inf)
    return torch.stack([world.sum(loss), norm.to(device), overflow(state.scaler, state.optimizer, device)])


def take_step(
    gradient: Gradient, step: Step, state: TrainState, inputs: Inputs, options: TrainParams, callbacks: CallbackList
) -> None:
    """Callbacks, optimizer, schedule, and the row of plots/train.tsv where one is due."""
    progress = state.progress
    if not gradient.overflowed:
        seed_all(options.seed, step.number, AFTER_BACKWARD)
        callbacks.on_pre_optimizer_step()
    learning_rate = state.optimizer.param_groups[0]["lr"]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()

    progress.step += 1
    state.schedule.after_step(state.ends_epoch, gradient.overflowed)
    progress.count(gradient.loss, rows=len(step.rows))
    callbacks.on_step_end()
    if progress.step % options.logging_steps == 0 or progress.step == inputs.total_steps:
        callbacks.on_log(state.log_row(learning_rate, gradient.norm))


def agree_to_stop(world: World, stop: StopRequest, progress: Progress) -> bool:
    """Let a stop signal, or a callback's reason to stop, of any process count for all; whether there is one.

    What arrives later in one process counts when they agree again.
    """
    number, stopped = world.maximum(int(stop.signal or 0), int(progress.stop_reason is not None))
    if number and stop.signal is None:
        stop.signal = signal.Signals(number)
    if stopped and progress.stop_reason is None:
        progress.stop_reason = "a callback of another process stopped it"
    return bool(number or stopped)


def is_evaluation_due(options: TrainParams, state: TrainState, total_steps: int) -> bool:
    """Whether this step has an evaluation (`train.eval_strategy`, and the last step) that is not done yet."""
    step = state.progress.step
    here = state.ends_epoch if options.eval_steps is None else step % options.eval_steps == 0
    return (here or step == total_steps) and state.progress.evaluated_step != step


def evaluate(
    state: TrainState,
    inputs: Inputs,
    params: Params,
    recorder: SilentRecorder,
    callbacks: CallbackList,
    stop: StopRequest,
) -> None:
    """Score the validation split, write it down, keep the model if it is good, and tell schedule and callbacks. Left
    undone if asked to stop meanwhile: a resumed run does it again. The same in all processes."""
    try:
        predictions = predict(
            state.model,
            inputs.validation_split,
            inputs.tokenizer,
            inputs.objective,
            params.evaluate.eval_batch_size,
            inputs.device,
            params.train.precision,
            params.train.seed,
            lambda: stop.signal is not None,
            inputs.world,
        )
    except Stopped:
        return
    scores = predictions.scores(inputs.task, params.evaluate) if inputs.world.is_main else None
    scores = inputs.world.tell(scores)
    if inputs.world.is_main and not math.isfinite(scores["loss"]):
        print(f"warning: the validation loss of step {state.progress.step} is {scores['loss']}", file=sys.stderr)
    state.record("eval", scores)
    state.schedule.after_evaluation(scores["loss"])
    recorder.keep_candidate(scores)
    state.progress.evaluated_step = state.progress.step
    callbacks.on_evaluate(scores)


def load_steps(inputs: Inputs, first: int, num_workers: int) -> Iterator[Step]:
    """The steps from number `first` to the last, with this process's share of their batches."""
    world = inputs.world
    plan = [inputs.plan.steps(first, inputs.total_steps) for _ in range(2)]
    rows = (micro_batch.rows for step in plan[0] for micro_batch in share(step, world.rank, world.size))
    batches = iter(
        make_loader(inputs.train_split, rows, inputs.tokenizer, inputs.device, num_workers, ignore_stop_signals)
    )
    for step in plan[1]:
        mine = [(micro_batch, next(batches)) for micro_batch in share(step, world.rank, world.size)]
        yield Step(step[0].step, [row for micro_batch in step for row in micro_batch.rows], mine)


def _non_finite(gradient: Gradient, step: Step) -> NonFiniteLoss:
    shown = ", ".join(map(str, step.rows[:SHOWN_ROWS])) + (", ..." if len(step.rows) > SHOWN_ROWS else "")
    return NonFiniteLoss(
        f"the loss of step {step.number} is {gradient.loss}, its gradient's norm {gradient.norm}; its rows of train "
        f"are {shown}; the state before it is saved: look at the rows, or try a lower train.learning_rate, more "
        "warmup_steps, max_grad_norm 1.0, or precision fp32"
    )
