"""What a start of train is made of, the same in every process, and how several processes meet."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

from stages.batches.plan import BatchPlan
from stages.batches.tokenized import TOKENIZED, Task, load_split, load_task, load_tokenizer
from stages.config.pretrained import resolve_model
from stages.config.schema import EvaluateParams, Params, TrainParams
from stages.ground.errors import UserError
from stages.ground.signals import StopRequest
from stages.keeping import environment
from stages.keeping.identity import Identity
from stages.modeling.build import build_model
from stages.modeling.compute import Compute
from stages.modeling.head import head_of
from stages.modeling.losses import loss_name, make_objective
from stages.modeling.parallel import Parallel
from stages.modeling.precision import make_scaler
from stages.reduction.base import Reduction
from stages.reduction.exact import Exact
from stages.reduction.fast import Fast
from stages.run.history import History
from stages.run.state import TrainState
from stages.scoring.scorer import Scorer
from stages.training.callbacks import make_callbacks
from stages.training.optim import freeze, make_optimizer, make_schedule
from stages.training.steps import Inputs


def load_inputs(params: Params, compute: Compute) -> Inputs:
    """What the tokenize and build_loaders stages left, and the loss over it."""
    train = params.train
    task, train_split, tokenizer, plan = load_task(), load_split(TOKENIZED, "train"), load_tokenizer(), BatchPlan()
    require_threshold_of_use(params.evaluate, task)
    objective = make_objective(train, task, train_split, compute.device)
    validation = load_split(TOKENIZED, "validation")
    planned_steps = plan.planned_steps(train.num_train_epochs, train.max_steps)
    if planned_steps > plan.epochs * plan.steps_per_epoch:
        raise UserError(
            f"the batch plan has {plan.epochs * plan.steps_per_epoch} steps, and {planned_steps} are to be trained; "
            "run: dvc repro build_loaders"
        )
    if train.stop_step is not None and train.stop_step > planned_steps:
        raise UserError(f"train.stop_step is {train.stop_step}, but there are {planned_steps} steps; write null")
    return Inputs(
        task=task,
        train_split=train_split,
        tokenizer=tokenizer,
        plan=plan,
        total_steps=train.stop_step or planned_steps,
        planned_steps=planned_steps,
        objective=objective,
        scorer=Scorer(validation, tokenizer, objective, params.evaluate.eval_batch_size, compute),
        compute=compute,
    )


def require_threshold_of_use(evaluate: EvaluateParams, task: Task) -> None:
    """Refuse a threshold where the likeliest of several classes is predicted. Raises UserError."""
    if evaluate.threshold != 0.5 and task.kind.has_classes and not task.kind.several and len(task.label_names) > 2:
        raise UserError(
            f"evaluate.threshold is {evaluate.threshold}, but of {len(task.label_names)} classes the likeliest is "
            "predicted; write 0.5"
        )


def build_state(params: Params, inputs: Inputs, say: Callable[[str], None] = lambda line: None) -> TrainState:
    """The model and all that trains it, as they are at a run's beginning; `say` is told what of the model is new."""
    train, device = params.train, inputs.compute.device
    folder = resolve_model(params.model.source, params.model.revision)
    head = head_of(inputs.task, loss_name(train, inputs.task))
    pad_token_id = None if inputs.tokenizer is None else inputs.tokenizer.pad_token_id
    model = build_model(params.model, folder, head, train.seed, pad_token_id, say)
    model.to(device)
    freeze(model, train.freeze)
    optimizer = make_optimizer(model, train, device)
    return TrainState(
        parallel=Parallel(model, train.compile),
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, inputs.planned_steps, params.evaluate),
        scaler=make_scaler(device, train.precision),
        callbacks=make_callbacks(params),
        histories={"train": History(("step", "epoch", "loss", "learning_rate", "grad_norm")), "eval": History()},
        steps_per_epoch=inputs.plan.steps_per_epoch,
    )


def make_reduction(train: TrainParams, parallel: Parallel, compute: Compute) -> Reduction:
    """How a step is put together (`train.reduction`)."""
    return Exact(parallel, compute.world) if train.reduction == "exact" else Fast(parallel, compute)


class OtherIdentity(UserError):
    """A process of this job would train another run than the main one."""


def meet(compute: Compute, identity: Identity, stop: StopRequest, is_complete: bool) -> bool:
    """Where there are several processes, wait until all are here; whether the run `is_complete`, as the main one says.

    Raises:
        OtherIdentity: in all of them, naming the first process that has another identity, or, where the bits would
            depend on which process runs what, another environment, and the differences.
    """
    world = compute.world
    if world.size == 1:
        return is_complete
    with stop.suspended():  # the main process comes once everything is in order
        world.join(compute.device)
    here = {**environment.current(compute.device), "threads": None}  # which process 0 decides
    everyone = world.gather_objects([socket.gethostname(), identity.values, here, is_complete])
    require_same(everyone)
    return bool(everyone[0][3])


def require_same(everyone: Sequence[tuple[str, dict[str, Any], dict[str, Any], bool]]) -> None:
    """`meet`'s comparison of every process's host, identity and environment. Raises OtherIdentity."""
    host, identity, surroundings, _ = everyone[0]
    main = Identity("train", identity)
    for rank, (other, theirs, around, _) in enumerate(everyone):
        who = f"process {rank} on {other} would train {{}} than process 0 on {host} (its value -> that of process 0)"
        if differences := main.difference(theirs):
            raise OtherIdentity(
                f"{who.format('another run')}: {', '.join(differences[:5])}; "
                "give all processes the same files and params.yaml"
            )
        if identity["train.reduction"] == "exact" and (differences := environment.difference(around, surroundings)):
            raise OtherIdentity(
                f"{who.format('with other bits')}: {', '.join(differences)}; "
                "give all processes the same, or write train.reduction: fast"
            )
