"""A look at one batch before training starts: what would cost a night is found in a second or two.

Errors stop, doubts warn, each in one line. Nothing of the run's state is changed.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.batches.collate import make_loader
from stages.config.schema import FACTORY, Params, is_custom
from stages.ground.errors import UserError, located, quote, user_code
from stages.modeling import codec
from stages.modeling.buffers import Buffers
from stages.modeling.build import extra_state, load_model, save_model
from stages.modeling.head import head_of
from stages.modeling.losses import loss_name, own_state
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.run.state import TrainState
from stages.scoring.scorer import Scorer
from stages.tasks.base import Kind
from stages.training.steps import Inputs

SHOWN_CHARACTERS = 160
# What only changes a tensor's shape, type or place in the graph that autograd records.
PASSED_THROUGH = ("ToCopy", "View", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Clone", "Alias", "Expand")


def preflight(state: TrainState, inputs: Inputs, params: Params, say: Callable[[str], None]) -> None:
    """Run the first micro-batch forward and backward, and a batch of the validation split through the metrics.

    Raises:
        UserError: a model or loss that cannot be called with this batch, logits of the wrong shape or that are not
            finite, labels of the wrong type or range, a softmax or sigmoid that the loss would apply again, nothing to
            train, tensors on several devices, a callback state that no checkpoint can hold, or a metric that fails.
    """
    model, compute, task = state.model, inputs.compute, inputs.task
    extra_state(model)
    for what, tree in (
        ("train.callbacks", state.parts()["callbacks"].state_dict()),
        ("train.lr_scheduler_type", state.schedule.scheduler.state_dict()),
    ):
        try:
            codec.split(tree, what)
        except TypeError as error:
            raise UserError(f"{error}, so no checkpoint can hold it") from None
    _check_devices(model, compute.device)
    micro_batch = next(itertools.chain.from_iterable(inputs.plan.steps(1, 1)))
    batch = next(iter(make_loader(inputs.train_split, [micro_batch.rows], inputs.tokenizer, compute.device, 0)))
    batch = compute.put(batch)
    labels = batch.pop("labels")
    head = head_of(task, loss_name(params.train, task))
    _check_labels(labels, task.kind, len(task.label_names))
    shapes = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in batch.items())
    with _untouched(model):
        compute.seed_at(micro_batch.step, micro_batch.micro_batch)
        watch, own = _watch_lost_buffers(model), _watch_own_state(model)
        source = f"model.source {quote(params.model.source)}"
        with user_code(f"{source} fails on the first batch ({shapes})"), compute.autocast():
            logits = state.parallel.forward(batch)
        watch()
        if params.model.source.startswith(FACTORY) and (changed := own()):
            say(
                f"warning: model.source: forward changes {', '.join(changed[:3])} of the model, which no checkpoint "
                "holds: if results depend on it, a run that was killed ends with others; make it a buffer, or part of "
                "get_extra_state"
            )
        _check_logits(logits, len(labels), head.outputs, params.model.source)
        _check_activation(logits, head.outputs, is_custom(params.train.loss or ""), say)
        given = f"logits {_shape(logits)} and labels {_shape(labels)}"
        with user_code(f"train.loss {params.train.loss} fails on {given}"):
            loss = inputs.objective.rows(logits, labels).sum() / inputs.objective.weight(labels)
            each = inputs.objective.each_row(logits.detach(), labels).sum() / inputs.objective.weight(labels)
        if not torch.isfinite(loss):
            raise UserError(f"the first loss is {loss.item()}; look at train.loss, its labels and precision")
        if not loss.requires_grad:
            raise UserError("the loss depends on no parameter that is trained; look at train.freeze and the model")
        if not torch.isclose(loss, each, rtol=1e-3, atol=1e-5):
            say(
                f"warning: train.loss gives {loss.item():.4g} for the batch, but {each.item():.4g} as the mean of its "
                "rows one by one; a scalar should be the mean over the rows"
            )
        with user_code("the first backward pass fails"):
            loss.backward()
        _doubt_gradients(model, say)
    _check_last_micro_batch(state, inputs, params)
    say(f"first batch: {shapes}, labels {_shape(labels)}, logits {_shape(logits)}, loss {loss.item():.4f}")
    _doubt_loss(loss.item(), inputs, params, labels, say)
    if params.train.warmup_steps >= inputs.planned_steps:
        say(
            f"warning: train.warmup_steps is {params.train.warmup_steps:g}, of {inputs.planned_steps} steps in all, "
            "so the learning rate never reaches train.learning_rate"
        )
    if inputs.tokenizer is not None:
        text = inputs.tokenizer.decode(batch["input_ids"][0])
        say(f"first row: {quote(text, SHOWN_CHARACTERS)}, label {_label(labels[0], task.label_names)}")
    _check_evaluation(state, inputs, params, say)


def _watch_lost_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that refuses buffers which changed since, but are in no checkpoint: a resumed run would differ."""
    kept = model.state_dict().keys()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in kept}

    def check() -> None:
        for name, buffer in model.named_buffers():
            if name in before and not torch.equal(buffer, before[name]):
                raise UserError(
                    f"model.source: forward changes the buffer {name}, which is not persistent, so no checkpoint holds "
                    "it; register it with persistent=True"
                )

    return check


def _watch_own_state(model: nn.Module) -> Callable[[], list[str]]:
    """A function that names what modules hold besides parameters, buffers and extra state, and have changed since."""
    kept = {name for name, _ in model.named_buffers()}
    with_extra = {name for name, m in model.named_modules() if type(m).get_extra_state is not nn.Module.get_extra_state}
    before = own_state(model)

    def changed() -> list[str]:
        return [
            name
            for name, found in own_state(model).items()
            if name not in kept and name.rpartition(".")[0] not in with_extra and before.get(name, ...) != found
        ]

    return changed


def _check_last_micro_batch(state: TrainState, inputs: Inputs, params: Params) -> None:
    """An epoch's last micro-batch may be smaller, down to a row, which BatchNorm for one cannot take."""
    last_step = inputs.plan.steps_per_epoch
    if last_step > inputs.total_steps:
        return
    micro_batch, compute = next(inputs.plan.steps(last_step, last_step))[-1], inputs.compute
    batch = next(iter(make_loader(inputs.train_split, [micro_batch.rows], inputs.tokenizer, compute.device, 0)))
    batch = compute.put(batch)
    batch.pop("labels")
    advice = "write build_loaders.drop_last: true, or another micro_batch_size, if that is why"
    what = f"model.source {quote(params.model.source)} fails on an epoch's last micro-batch, of {len(micro_batch.rows)}"
    with _untouched(state.model), user_code(f"{what} rows ({advice})"), compute.autocast():
        compute.seed_at(micro_batch.step, micro_batch.micro_batch)
        state.parallel.forward(batch)


def _check_rebuilt(model: nn.Module, expected: NDArray[np.float32], params: Params, scorer: Scorer) -> None:
    """A model of one's own that is saved and built again has to be the same, as that is what is published."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder), params.model)
        rebuilt = load_model(Path(folder), scorer.compute.device, params.model.source)
    found = scorer(lambda: Parallel(rebuilt)).logits
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError(
            f"model.source {quote(params.model.source)}: saved and built again, the model gives other logits, so it "
            "keeps tensors outside of its state_dict; make them parameters or buffers, lists of modules ModuleLists"
        )


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _label(label: Tensor, names: tuple[str, ...]) -> str:
    if label.ndim:
        return ", ".join(quote(name) for name, on in zip(names, label.tolist(), strict=True) if on) or "none"
    return quote(names[int(label)]) if names else f"{label.item():g}"


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Training mode; running statistics, gradients and the mode are put back."""
    buffers = Buffers(model)
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        buffers.put_back()


def _check_devices(model: nn.Module, device: torch.device) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index):
            raise UserError(
                f"model.source: {name} is on {tensor.device}, the batch on {device}; "
                "make tensors with register_buffer or as parameters, and name no device in the model"
            )


def _check_labels(labels: Tensor, kind: Kind, classes: int) -> None:
    expected = getattr(torch, kind.label_dtype)
    if labels.dtype != expected:
        raise UserError(f"the labels are {labels.dtype}, but {kind.name} needs {expected}; run: dvc repro tokenize")
    outside = (labels < 0) | (labels > (1 if kind.several else classes - 1))
    if kind.has_classes and bool(outside.any()):
        raise UserError(
            f"label {labels[outside][0].item()} is outside of the {classes} classes; run: dvc repro tokenize"
        )


def _check_logits(logits: Tensor, rows: int, outputs: int, source: str) -> None:
    if logits.shape != (rows, outputs):
        raise UserError(
            f"model.source {quote(source)} gives logits of shape {tuple(logits.shape)} for {rows} rows; the task and "
            f"loss need {(rows, outputs)}"
        )
    if not logits.dtype.is_floating_point:
        raise UserError(f"model.source {quote(source)} gives logits of type {logits.dtype}; they have to be floats")
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"model.source {quote(source)} gives logits that are infinite or NaN for the first batch")


def _check_activation(logits: Tensor, outputs: int, custom_loss: bool, say: Callable[[str], None]) -> None:
    """The losses by name apply softmax or sigmoid themselves; a second one trains badly without a word."""
    node = logits.grad_fn
    while node is not None and node.name().startswith(PASSED_THROUGH) and node.next_functions:
        node = node.next_functions[0][0]
    last = node.name() if node is not None else ""
    sums = logits.float().sum(dim=1)
    looks_like_softmax = outputs > 1 and bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())
    if last.startswith("Softmax") or looks_like_softmax:
        name = "softmax"
    elif last.startswith("Sigmoid"):
        name = "sigmoid"
    else:
        if logits.numel() >= 16 and bool(((logits > 0) & (logits < 1)).all()):
            say("warning: all logits of the first batch are between 0 and 1; does the model end in a sigmoid?")
        return
    line = f"the model ends in a {name}, and the loss applies its own; return the logits before it"
    if not custom_loss:
        raise UserError(f"model.source: {line}")
    say(f"warning: {line} (predictions and their probabilities are read off logits)")


def _doubt_gradients(model: nn.Module, say: Callable[[str], None]) -> None:
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise UserError(
                f"model.source: {name} gets a sparse gradient, which can be neither clipped nor summed over processes; "
                "make its layer without sparse=True"
            )
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        say(
            f"warning: {', '.join(idle[:3])}{more} get no gradient, so they stay as they are; "
            "does forward use them? If they should stay, name them in train.freeze"
        )


def _doubt_loss(loss: float, inputs: Inputs, params: Params, labels: Tensor, say: Callable[[str], None]) -> None:
    """Compare with an untrained head: ln C for C classes, ln 2 a label, and without classes the mean of the labels."""
    task, train = inputs.task, params.train
    name = loss_name(train, task)
    if is_custom(name) or train.loss_kwargs or train.init_from_run or (task.kind.several and train.class_weights):
        return
    if not task.kind.has_classes:
        constant = inputs.objective.rows(labels.mean().expand(len(labels), 1), labels).mean().item()
        if loss > 10 * constant + 1e-6:
            say(
                f"warning: the first loss is {loss:.4g}, always answering with the mean gives {constant:.4g}; "
                "standardise the label, or start from its mean"
            )
        return
    expected = math.log(2 if name == "bce_with_logits" else len(task.label_names))
    known = f"an untrained head gives ln {2 if name == 'bce_with_logits' else len(task.label_names)} = {expected:.4f}"
    if loss > 1.5 * expected + 0.5:
        say(f"warning: the first loss is {loss:.4f}, {known}; are the inputs or the last layer scaled too large?")
    elif loss < 0.25 * expected:
        say(f"warning: the first loss is {loss:.4f}, {known}; is the head trained already, or the label in the inputs?")


def _check_evaluation(state: TrainState, inputs: Inputs, params: Params, say: Callable[[str], None]) -> None:
    split, size = inputs.scorer.split, inputs.scorer.batch_size
    rows = np.linspace(0, len(split) - 1, min(size, len(split))).astype(int)  # spread, as splits may be sorted by label

    # The other processes are not here yet.
    name = inputs.scorer.name if len(rows) == len(split) else f"{len(rows)} rows spread over {inputs.scorer.name}"
    scorer = replace(inputs.scorer, split=split.select(rows), compute=replace(inputs.compute, world=World()), name=name)
    with located(f"model.source is {quote(params.model.source)}"):
        predictions = scorer(lambda: state.parallel)
    if params.model.source.startswith(FACTORY):
        _check_rebuilt(state.model, predictions.logits, params, scorer)
    try:
        predictions.scores(inputs.task, params.evaluate)
    except UserError as error:
        # What a metric of one's own makes of a few rows need not be what it makes of all.
        if error.__cause__ is None or len(rows) == len(split):
            raise
        say(f"warning: {error} (for {len(rows)} of {len(split)} validation rows)")
