"""The training loop. Read it top to bottom; everything it calls does one thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import datasets
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from stages.config.errors import UserError
from stages.config.params import EvaluateParams, TrainParams
from stages.data.collate import make_loader, to_device
from stages.data.store import Task
from stages.plan.batch_plan import BatchPlan
from stages.run.saver import Saver
from stages.run.signals import StopRequest, ignore_stop_signals
from stages.training.candidates import Candidates
from stages.training.evaluation import Stopped, predict, score_predictions
from stages.training.losses import Objective
from stages.training.precision import autocast
from stages.training.progress import StepProgress
from stages.training.randomness import seed_all
from stages.training.saving import SaveSchedule
from stages.training.state import TrainState


@dataclass(frozen=True)
class Inputs:
    """What the loop works on and does not change."""

    task: Task
    train_split: datasets.Dataset
    validation_split: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    plan: BatchPlan
    total_steps: int
    objective: Objective
    device: torch.device


class NonFiniteLoss(UserError):
    """The loss or its gradient became NaN or infinite; the state before that step is intact."""


def is_evaluation_due(params: TrainParams, state: TrainState, ends_epoch: bool, total_steps: int) -> bool:
    """Whether this step boundary has an evaluation (`train.eval_strategy`, and the last step) that is not done yet."""
    step = state.progress.step
    here = ends_epoch if params.eval_steps is None else step % params.eval_steps == 0
    return (here or step == total_steps) and state.progress.evaluated_step != step


def train(
    state: TrainState,
    inputs: Inputs,
    params: TrainParams,
    evaluation: EvaluateParams,
    candidates: Candidates,
    saver: Saver,
    save_schedule: SaveSchedule,
    stop: StopRequest,
) -> None:
    """Train until the last step, early stopping, or a stop request; `state` says which.

    Every iteration begins at a step boundary, where the state is whole: that is where it is evaluated, saved and
    left. The plan says what to run, so where the run is, is `state.progress.step` and nothing else.

    Raises:
        NonFiniteLoss: with the step and what to try.
        SaveError: a checkpoint or candidate could not be written.
    """
    model, optimizer, scaler, progress = state.model, state.optimizer, state.scaler, state.progress
    device, plan, total_steps = inputs.device, inputs.plan, inputs.total_steps
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = (m.rows for step in plan.steps(progress.step + 1, total_steps) for m in step)
    loader = iter(
        make_loader(inputs.train_split, rest, inputs.tokenizer, device, params.num_workers, ignore_stop_signals)
    )
    steps = plan.steps(progress.step + 1, total_steps)
    shown = StepProgress(progress.step, total_steps)
    model.train()

    while True:
        ends_epoch = progress.step % plan.steps_per_epoch == 0
        epoch = round(progress.step / plan.steps_per_epoch, 6)

        # Not counted until it is complete: asked to stop half-way, a resumed run does it again.
        if is_evaluation_due(params, state, ends_epoch, total_steps):
            try:
                predictions = predict(
                    model,
                    inputs.validation_split,
                    inputs.tokenizer,
                    inputs.objective,
                    evaluation.eval_batch_size,
                    device,
                    params.precision,
                    lambda: stop.signal is not None,
                )
            except Stopped:
                break
            scores = score_predictions(predictions, inputs.task, evaluation)
            state.schedule.after_evaluation(scores["loss"])
            state.stopper.update(scores[evaluation.metric_for_best_model])
            state.eval_history.append(step=progress.step, epoch=epoch, **scores)
            progress.candidates = candidates.add(progress.candidates, progress.step, scores, model)
            if not saver.busy:
                candidates.remove_unused(progress.candidates, saver.store)
            progress.evaluated_step = progress.step

        saver.check()
        if save_schedule.due(progress, ends_epoch):
            saver.save(progress.step, state.state_dict)
        if stop.signal or state.stopper.reason or progress.step == total_steps:
            break

        # One optimizer step: the mean over its rows, however it is cut into micro-batches.
        micro_batches = next(steps)
        batches = [next(loader) for _ in micro_batches]
        weight = sum(inputs.objective.weight(batch["labels"]) for batch in batches)
        loss = torch.zeros((), device=device)
        for micro_batch, batch in zip(micro_batches, batches, strict=True):
            seed_all(params.seed, micro_batch.step, micro_batch.micro_batch)
            batch = to_device(batch, device)
            labels = batch.pop("labels")
            with autocast(device, params.precision):
                logits = model(**batch).logits
            micro_loss = inputs.objective.rows(logits, labels).sum() / weight
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        step_loss = loss.item()
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(trained, params.max_grad_norm or math.inf).item()
        # An infinite gradient under an fp16 scaler is usual: it skips the step and lowers the scale.
        if not math.isfinite(step_loss) or (not math.isfinite(grad_norm) and not scaler.is_enabled()):
            raise NonFiniteLoss(
                f"the loss of step {progress.step + 1} is {step_loss}, its gradient's norm {grad_norm} (its rows: "
                f"data/loaders, step {progress.step + 1}); try a lower train.learning_rate, more warmup_steps, "
                "max_grad_norm 1.0, or precision fp32"
            )
        learning_rate = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        progress.step += 1
        progress.rows += sum(len(m.rows) for m in micro_batches)
        state.schedule.after_step(ends_epoch=progress.step % plan.steps_per_epoch == 0)

        progress.window_loss += step_loss
        progress.window_steps += 1
        progress.total_loss += step_loss
        mean_loss = progress.window_loss / progress.window_steps
        shown.update(progress.step, sum(len(m.rows) for m in micro_batches), mean_loss, learning_rate)
        if progress.step % params.logging_steps == 0 or progress.step == total_steps:
            state.train_history.append(
                step=progress.step,
                epoch=round(progress.step / plan.steps_per_epoch, 6),
                loss=mean_loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
            )
            progress.window_loss, progress.window_steps = 0.0, 0

    shown.close()
