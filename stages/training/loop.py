"""The training loop. Read it top to bottom; everything it calls does one thing."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import datasets
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from stages.batches.collate import make_loader, to_device
from stages.batches.plan import BatchPlan, MicroBatch, share
from stages.batches.randomness import AFTER_BACKWARD, seed_all
from stages.batches.tokenized import Task
from stages.config.schema import Params, TrainParams
from stages.ground.errors import UserError
from stages.ground.signals import StopRequest, ignore_stop_signals
from stages.modeling.buffers import remember_buffers
from stages.modeling.forward import Forward, compiled
from stages.modeling.losses import Objective
from stages.modeling.precision import autocast, overflowed
from stages.modeling.world import Parallel, World
from stages.run.recorder import Recorder
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


def train(
    state: TrainState,
    inputs: Inputs,
    params: Params,
    recorder: Recorder | None,
    watchers: Sequence[Callback],
    stop: StopRequest,
) -> None:
    """Train until the last step, until a callback ends the run, or a stop request; `state` says which.

    Every iteration begins at a step boundary, where the state is whole: that is where it is evaluated, saved and
    left. The plan says what to run, so where the run is, is `state.progress.step` and nothing else. Several processes
    run this side by side; the main one has the `recorder`, and the `watchers`, callbacks that only show something.

    Raises:
        NonFiniteLoss: with the step, its rows and what to try.
        SaveError: a checkpoint or candidate could not be written.
    """
    model, optimizer, scaler, progress = state.model, state.optimizer, state.scaler, state.progress
    device, objective, world, options = inputs.device, inputs.objective, inputs.world, params.train
    callbacks = CallbackList([*cast("Mapping[str, Callback]", state.callbacks).values(), *watchers], state)
    parallel = Parallel(Forward(model), world, device)
    forward = compiled(parallel.module) if options.compile else parallel.module
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = inputs.plan.steps(progress.step + 1, inputs.total_steps)
    batches = iter(_load(inputs, progress.step + 1, options.num_workers))
    callbacks.on_train_begin()
    model.train()

    while True:
        stops = agree_to_stop(world, stop, progress)
        if is_evaluation_due(options, state, inputs.total_steps):
            scores = evaluate(state, inputs, params, stop)
            if scores is None:  # asked to stop half-way: a resumed run does it again
                agree_to_stop(world, stop, progress)
                break
            state.schedule.after_evaluation(scores["loss"])
            if recorder:
                recorder.keep_candidate(scores)
            progress.evaluated_step = progress.step
            callbacks.on_evaluate(scores)
            stops = agree_to_stop(world, stop, progress)
        if recorder:
            recorder.save_if_due()
        if stops or progress.step == inputs.total_steps:
            break

        # One optimizer step: the mean over its rows, however it is cut into micro-batches and processes.
        step = next(steps)
        mine = [(micro_batch, next(batches)) for micro_batch in share(step, world.rank, world.size)]
        weights = [objective.weight(batch["labels"]) for micro_batch, batch in mine if micro_batch.counted]
        weight = world.sum(torch.tensor(sum(weights), dtype=torch.float64)).item()
        loss = torch.zeros((), device=device)
        put_buffers_back = remember_buffers(model)
        for micro_batch, batch in mine:
            seed_all(options.seed, micro_batch.step, micro_batch.micro_batch)
            batch = to_device(batch, device)
            labels = batch.pop("labels")
            with parallel.sync(last=micro_batch is mine[-1][0]):
                with autocast(device, options.precision):
                    logits = forward(batch)
                micro_loss = objective.rows(logits, labels).sum() * micro_batch.counted / weight
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        step_loss = world.sum(loss).item()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(trained, options.max_grad_norm or math.inf).item()
        skipped = overflowed(scaler, optimizer)
        if not math.isfinite(step_loss) or not (math.isfinite(grad_norm) or skipped):
            put_buffers_back()
            callbacks.on_train_end()
            raise _non_finite(step_loss, grad_norm, step)
        if not skipped:
            seed_all(options.seed, step[0].step, AFTER_BACKWARD)
            callbacks.on_pre_optimizer_step()
        learning_rate = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        progress.step += 1
        state.schedule.after_step(state.ends_epoch, skipped)
        progress.count(step_loss, rows=sum(len(micro_batch.rows) for micro_batch in step))
        callbacks.on_step_end()
        if progress.step % options.logging_steps == 0 or progress.step == inputs.total_steps:
            callbacks.on_log(state.log_row(learning_rate, grad_norm))

    callbacks.on_train_end()


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
    """Whether this step boundary has an evaluation (`train.eval_strategy`, and the run's end) that is not done yet."""
    step = state.progress.step
    here = state.ends_epoch if options.eval_steps is None else step % options.eval_steps == 0
    ends = step == total_steps or state.progress.stop_reason is not None
    return (here or ends) and state.progress.evaluated_step != step


def evaluate(state: TrainState, inputs: Inputs, params: Params, stop: StopRequest) -> dict[str, float] | None:
    """Score the validation split and write it down, or None if asked to stop meanwhile. The same in all processes."""
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
        return None
    scores = predictions.scores(inputs.task, params.evaluate) if inputs.world.is_main else None
    scores = inputs.world.tell(scores)
    if inputs.world.is_main and not math.isfinite(scores["loss"]):
        print(f"warning: the validation loss of step {state.progress.step} is {scores['loss']}", file=sys.stderr)
    state.record("eval", scores)
    return scores


def _load(inputs: Inputs, first_step: int, num_workers: int) -> torch.utils.data.DataLoader[dict[str, torch.Tensor]]:
    steps, world = inputs.plan.steps(first_step, inputs.total_steps), inputs.world
    rows = (micro_batch.rows for step in steps for micro_batch in share(step, world.rank, world.size))
    return make_loader(inputs.train_split, rows, inputs.tokenizer, inputs.device, num_workers, ignore_stop_signals)


def _non_finite(loss: float, grad_norm: float, step: list[MicroBatch]) -> NonFiniteLoss:
    rows = [row for micro_batch in step for row in micro_batch.rows]
    shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
    return NonFiniteLoss(
        f"the loss of step {step[0].step} is {loss}, its gradient's norm {grad_norm}; its rows of train are {shown}; "
        "the state before it is saved: look at the rows, or try a lower train.learning_rate, more warmup_steps, "
        "max_grad_norm 1.0, or precision fp32"
    )
