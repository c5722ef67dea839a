"""Stage 3 of 5: fine-tune. Writes models/candidates/, metrics/train.json, plots/train.tsv and plots/eval.tsv.

Kill it anywhere and run it again: it goes on from the run's newest checkpoint (`runs/<id>/`), to the same bits.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, NoReturn

from stages.config.pipeline import load_stage, require_folders
from stages.config.read import load_params
from stages.config.schema import Params
from stages.ground.errors import UserError, run_stage
from stages.ground.places import CANDIDATES, METRICS, PLOTS
from stages.ground.signals import StopRequest, die_with_parent, ignore_stop_signals

if TYPE_CHECKING:
    import torch

    from stages.keeping.folder import RunFolder
    from stages.keeping.identity import Identity
    from stages.modeling.world import World
    from stages.run.candidates import Candidates
    from stages.run.state import TrainState
    from stages.training.loop import Inputs

RECORD = METRICS / "train.json"


def say(line: str) -> None:
    """One line for people, on stderr as all progress is."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the stage from params.yaml. Exit code 0 only after publishing: DVC locks the stage as done then."""
    die_with_parent()
    # DDP complains of a setting that stages.modeling.world chooses on purpose, once a process and start.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("RANK", "0") == "0":
        lead()
    else:
        follow()


def lead() -> None:
    """The only process, or the main one of several: it alone reads and writes the run's folder, and speaks."""
    stop = StopRequest()
    stop.install()
    stage = load_stage("train")
    params = stage.params
    require_folders(stage)

    from stages.keeping.code import find_code, require_code
    from stages.keeping.folder import RunFolder, find_source, keep_within_limit, runs_limit
    from stages.keeping.identity import identify
    from stages.modeling.device import pick_device, set_arithmetic, set_threads
    from stages.modeling.world import World
    from stages.run.candidates import Candidates
    from stages.run.checkpoint import CheckpointStore
    from stages.run.recorder import Recorder
    from stages.run.resume import Resumer
    from stages.run.state import tell_state
    from stages.training.guard import ImportGuard
    from stages.training.loop import NonFiniteLoss, train
    from stages.watching.loggers import make_loggers
    from stages.watching.preflight import preflight
    from stages.watching.progress_bar import ProgressBar

    world = World.from_environment()
    require_work_for(world, params)
    runs_limit()  # a bad one is told now, and not after days
    identity = identify(stage)
    require_code(stage, identity.code)
    for later in ("evaluate", "select_best"):  # they run the same models, losses and metrics
        require_code(load_stage(later), find_code(load_stage(later)))
    run = RunFolder.of(identity)
    if params.train.init_from_run is not None and not run.checkpoint_steps():
        find_source(params.train.init_from_run)
    is_new = run.enter(identity)
    stop.on_request = run.lock.announce_stop
    if stop.signal:
        run.lock.announce_stop()
    if is_new:
        explain_new_run(run, identity)
    device = pick_device(params.train.device, world.local_rank if world.size > 1 else None)
    set_arithmetic(params.train.deterministic, params.train.tf32)
    set_threads(params.train.threads)
    inputs, state = prepare(params, device, world, run)
    candidates, store = Candidates(run.candidates, params), CheckpointStore(run.checkpoints, run.id)
    loggers = make_loggers(params.train.loggers, run.path, run.id, params.model_dump(by_alias=True))
    resumer = Resumer(
        state, run, identity, store, candidates, inputs.total_steps, device, world.size, params.train.threads, say
    )
    on_disk = resumer.resume(params.train.init_from_run)
    candidates.remove_unused(state.progress.candidates, store)
    if state.progress.step == 0:
        preflight(state, inputs, params, say)
    guard = ImportGuard(stage, identity.code)
    guard.check()

    if world.size > 1:
        with world.together():
            with stop.suspended():
                world.join(device)
            tell_state(world, state.state_dict())
    recorder = Recorder(state, store, candidates, params.train, on_disk)
    failure: NonFiniteLoss | None = None
    try:
        with world.together():
            train(state, inputs, params, recorder, [guard, ProgressBar(inputs.total_steps), *loggers], stop)
    except NonFiniteLoss as error:
        failure = error  # the state is that of the step before
    recorder.finish()
    with world.together():
        world.leave()
    if failure is not None:
        raise failure
    if not state.progress.is_complete(inputs.total_steps):
        assert stop.signal is not None
        run.log("stopped", step=state.progress.step, signal=stop.signal.name)
        ignore_stop_signals()  # a repeat would end the interpreter on its way out, with another exit code
        say(
            f"stopped by {stop.signal.name} after step {state.progress.step}, saved; "
            "run the same command again to go on"
        )
        sys.exit(1)
    guard.check()
    changed = identify(load_stage("train")).difference(identity.values)
    if changed:
        raise UserError(
            f"nothing is published: {'; '.join(changed[:3])} changed while run {run.id} trained; "
            "run again to train with the change, or undo it and run again to publish this result"
        )
    publish(run, state, candidates)
    run.finish()
    run.log("finished", step=state.progress.step)
    keep_within_limit(run, say)


def follow() -> NoReturn:
    """One of the other processes: it is given the state, trains its share, and writes nothing."""
    import torch

    from stages.modeling.device import pick_device, set_arithmetic
    from stages.modeling.world import World
    from stages.run.recorder import SilentRecorder
    from stages.run.state import tell_state
    from stages.training.loop import NonFiniteLoss, train

    params, world, stop = load_params(), World.from_environment(), StopRequest()
    device = pick_device(params.train.device, world.local_rank)
    set_arithmetic(params.train.deterministic, params.train.tf32)
    failed = False
    with world.together():
        world.join(device)  # the main process comes once everything is in order; until then a signal may end this one
        stop.install()
        inputs, state = prepare(params, device, world, None)
        state.load_state_dict(tell_state(world, None))
        torch.set_num_threads(state.progress.environment["threads"])
        try:
            train(state, inputs, params, SilentRecorder(), [], stop)
        except NonFiniteLoss:
            failed = True  # the main process says so
        world.leave()
    ignore_stop_signals()
    sys.exit(2 if failed else 0 if state.progress.is_complete(inputs.total_steps) else 1)


def require_work_for(world: World, params: Params) -> None:
    """Refuse more processes than a step has micro-batches."""
    loaders, size = params.build_loaders, world.size
    if loaders.micro_batches_per_step < size:
        raise UserError(
            f"a step has {loaders.micro_batches_per_step} micro-batches (build_loaders.batch_size {loaders.batch_size} "
            f"/ micro_batch_size {loaders.micro_batch_size}), fewer than the {size} processes of train.launcher; "
            f"write a micro_batch_size of at most {max(loaders.batch_size // size, 1)}, or start fewer processes "
            "(train.launcher: python starts one)"
        )


def explain_new_run(run: RunFolder, identity: Identity) -> None:
    """Say why a run starts from the beginning although there are others."""
    from stages.keeping.folder import list_runs

    others = [other for other in list_runs() if other.id != run.id and other.identity_values() is not None]
    if others:
        newest = others[0]
        lines = identity.difference(newest.identity_values() or {})
        more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
        reference = newest.newest_reference()
        how = f"; to continue that one on purpose, set train.init_from_run: {reference}" if reference else ""
        say(f"new run {run.id}; it differs from run {newest.id} in {', '.join(lines[:5])}{more}{how}")


def prepare(params: Params, device: torch.device, world: World, run: RunFolder | None) -> tuple[Inputs, TrainState]:
    """Load what the tokenize and build_loaders stages left, and build the model and all that trains it. Histories are
    written below `run`, if it is given."""
    from stages.batches.plan import BatchPlan
    from stages.batches.tokenized import TOKENIZED, load_split, load_task, load_tokenizer
    from stages.config.pretrained import resolve_model
    from stages.modeling.build import build_model
    from stages.modeling.head import head_of
    from stages.modeling.losses import loss_name, make_objective
    from stages.modeling.precision import make_scaler
    from stages.run.history import History
    from stages.run.state import TrainState
    from stages.training.callbacks import make_callbacks
    from stages.training.loop import Inputs
    from stages.training.optim import freeze, make_optimizer, make_schedule

    train = params.train
    task, train_split, plan = load_task(), load_split(TOKENIZED, "train"), BatchPlan()
    total_steps = train.max_steps or train.num_train_epochs * plan.steps_per_epoch
    inputs = Inputs(
        task=task,
        train_split=train_split,
        validation_split=load_split(TOKENIZED, "validation"),
        tokenizer=load_tokenizer(),
        plan=plan,
        total_steps=total_steps,
        objective=make_objective(train, task, train_split, device),
        device=device,
        world=world,
    )
    folder = resolve_model(params.model.source, params.model.revision)
    model = build_model(params.model, folder, head_of(task, loss_name(train, task)), train.seed)
    model.to(device)
    freeze(model, train.freeze)
    optimizer = make_optimizer(model, train, device)
    histories = {}
    if run is not None:
        logged = ["step", "epoch", "loss", "learning_rate", "grad_norm"]
        histories = {"train": History(run.history / "train.tsv", logged), "eval": History(run.history / "eval.tsv")}
    state = TrainState(
        model=model,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, total_steps),
        scaler=make_scaler(device, train.precision),
        callbacks=make_callbacks(params),
        histories=histories,
        steps_per_epoch=plan.steps_per_epoch,
    )
    return inputs, state


def publish(run: RunFolder, state: TrainState, candidates: Candidates) -> None:
    """Write the stage's outs from the finished run. Metrics and plots come last, each whole or not at all."""
    from stages.ground import disk

    progress = state.progress
    candidates.copy_to(CANDIDATES, progress.candidates)
    PLOTS.mkdir(exist_ok=True)
    for history in state.histories.values():
        shutil.copyfile(history.path, PLOTS / history.path.name)
    disk.write_text(
        RECORD,
        disk.dumps(
            {
                "steps": progress.step,
                "epochs": state.epoch,
                "stopped_early": progress.stop_reason is not None,
                "best_step": progress.candidates[0]["step"],
                "train_loss": progress.total_loss / progress.step,
                "environments": progress.environments,
            }
        ),
    )
    say(f"run {run.id}: published {len(progress.candidates)} candidates, best at step {progress.candidates[0]['step']}")


if __name__ == "__main__":
    run_stage(main)
